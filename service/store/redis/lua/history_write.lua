-- Compare-and-set of one stream to a state that no chunk led to, with a history that leads to it.
--
-- KEYS[1], KEYS[2]  state key, reply key
-- KEYS[3], KEYS[4]  keys of its history (`history.lua`)
-- ARGV[1], ARGV[2]  as of `compare_and_set.lua`, which precedes this text with `history.lua`
-- ARGV[3]  expected, ARGV[4]  state, as of `compare_and_set`
-- ARGV[5]  reply, as of `compare_and_set`
-- ARGV[6]  "1": the stored snapshots up to the position of the state are kept; "0": none
-- ARGV[7]  number of entries, which are the whole list
-- ARGV[8..] the entries, then the states of further snapshots, ascending
--
-- States for other versions are dropped. Without entries and snapshots the history starts with the
-- state. Returns {result}, as of `compare_and_set`.

local expected, state, last_entry = ARGV[3], ARGV[4], 7 + ARGV[7]

return {compare_and_set(KEYS[1], KEYS[2], expected, state, ARGV[5], function()
  local head = redis.call('HGET', KEYS[4], 'head')
  -- the first write, which a full server rejects; it would let a script go on that has deleted
  redis.call('HSET', KEYS[4], 'head', head or '')
  redis.call('UNLINK', KEYS[3])
  local index = ''
  if ARGV[6] == '1' and head and string.sub(head, 1, 24) == expected then
    index = drop_snapshots(KEYS[4], string.sub(head, 25), position_of(state, 57))
    for _, each in ipairs(redis.call('HKEYS', KEYS[4])) do
      if string.sub(each, 1, 1) == 'v' then
        redis.call('HDEL', KEYS[4], each)
      end
    end
  else
    redis.call('UNLINK', KEYS[4])
  end
  for at = 8, last_entry do
    redis.call('RPUSH', KEYS[3], NO_TAG .. ARGV[at])
  end
  for at = last_entry + 1, #ARGV do
    index = add_snapshot(KEYS[4], index, ARGV[at])
  end
  if index == '' and last_entry == 7 then
    index = add_snapshot(KEYS[4], index, state)
  end
  write_head(KEYS[3], KEYS[4], state, index)
end)}
