-- Write states of streams for versions of their model that did not answer.
--
-- KEYS     for each stream: its state key, the two keys of its history (`history.lua`)
-- ARGV[1], ARGV[2]  as of `compare_and_set.lua`, which precedes this text with `history.lua`
-- ARGV[3..] for each stream: the state
--
-- Returns for each stream, in order: 1 if it was written; 0 if not: the stream is in another epoch,
-- or did not have the head of the state as far as its history reaches, the version itself wrote its
-- state, its history is not valid, or the state for the version is at the same position or further.

local function write(state_key, history_key, versions_key, value)
  local header = redis.call('GETRANGE', state_key, 0, 95)
  local head = redis.call('HGET', versions_key, 'head')
  if string.sub(header, 33, 40) ~= string.sub(value, 33, 40) or not head
    or string.sub(header, 33, 56) ~= string.sub(head, 1, 24)
    or string.sub(header, 17, 32) == string.sub(value, 17, 32)
    or not had_head(header, history_key, value) then
    return 0
  end
  local own = redis.call('HGET', versions_key, 'v' .. string.sub(value, 17, 32))
  if own and string.sub(own, 33, 40) == string.sub(value, 33, 40)
    and position_of(own, 57) >= position_of(value, 57) then
    return 0
  end
  keep_version(versions_key, value)
  return 1
end

local results = {}
for i = 1, #KEYS / 3 do
  local ok, result = pcall(write, KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i], ARGV[2 + i])
  results[i] = ok and result or 0
end
return results
