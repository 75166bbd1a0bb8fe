-- Commit items of a topic for its owner: states, outputs and acknowledgements together.
--
-- KEYS[1]  the topic
-- KEYS[2]  its lease (`topic_lease.lua`)
-- KEYS[3]  the streams that halt: a hash of names to times
-- KEYS[4]  the output topic
-- KEYS[5]  the dead-letter topic
-- KEYS[6..] for each chunk and each condition: its state key, its reply key, and for a chunk with a
--           history the two keys of that
-- ARGV[1], ARGV[2]  as of `compare_and_set.lua`, which precedes this text with `history.lua`
-- ARGV[3]  the consumer group
-- ARGV[4]  the consumer name in the group, the same for all owners
-- ARGV[5]  the fence of the owner
-- ARGV[6]  the number of this commit under the fence, from 1
-- ARGV[7]  about how many entries the output topic keeps; "0": all
-- ARGV[8]  "1": acknowledged entries are deleted
-- ARGV[9..] for each item:
--            "1", expected, state, reply, as of `compare_and_set`; or "3", these, and entry, events,
--            snapshots, as of `keep_history`; or "2", expected: a condition without a write, "" also
--            meets a tombstone; or "0"
--            a stream: "+" and its name halts it, "=" and its name: it must halt; "": none
--            number of entries that are acknowledged, and their ids
--            number of fields and values that each entry that is written begins with, and these
--            number of entries that are written, and of each: the index of its key, the number of
--            its further fields and values, and these
--
-- Returns the stored fence and number if they are not the owner's and the one before, and changes
-- nothing; otherwise {results}, of each item: as of `compare_and_set`, or
--   {-1, text}   failed with this error; nothing of the item was changed
--
-- An item is written whole or not at all: a full server rejects the first write, of the number, and
-- what an item did before any other error is taken back.

-- the flags of a tombstone
local DELETED = 4

local topic, group, consumer, kept = KEYS[1], ARGV[3], ARGV[4], ARGV[7]
local stored = redis.call('HMGET', KEYS[2], 'fence', 'number')
if stored[1] ~= ARGV[5] or tonumber(stored[2]) ~= ARGV[6] - 1 then
  return {stored[1] or '', stored[2] or ''}
end
for index = 4, 5 do
  redis.call('XLEN', KEYS[index])
end
redis.call('HLEN', KEYS[3])
redis.call('HSET', KEYS[2], 'number', ARGV[6])

-- Take back what an item did before it failed.
local function undo(first, last, added)
  for _, entry in ipairs(added) do
    redis.call('XDEL', entry[1], entry[2])
  end
  for index = first, last do
    redis.call('XCLAIM', topic, group, consumer, 0, ARGV[index], 'FORCE', 'JUSTID')
  end
end

local at, pair, results = 9, 6, {}
while at <= #ARGV do
  local kind, chunk = ARGV[at], at + 1
  at = at + (kind == '3' and 7 or kind == '1' and 4 or kind == '2' and 2 or 1)
  local halted, first = ARGV[at], at + 2
  local last = at + 1 + ARGV[at + 1]
  local shared = last + 1
  local entries = shared + 1 + ARGV[shared]
  at = entries + 1
  for _ = 1, tonumber(ARGV[entries]) do
    at = at + 2 + ARGV[at + 1]
  end

  local acknowledged, added = first - 1, {}
  local function write_entries()
    local halt, stream = string.sub(halted, 1, 1), string.sub(halted, 2)
    if halt == '=' and redis.call('HEXISTS', KEYS[3], stream) == 0 then
      error('NOTPENDING stream ' .. stream .. ' does not halt', 0)
    end
    for index = first, last do
      if redis.call('XACK', topic, group, ARGV[index]) == 0 then
        error('NOTPENDING entry ' .. ARGV[index], 0)
      end
      acknowledged = index
    end
    local from, fields = entries + 1, {unpack(ARGV, shared + 1, entries - 1)}
    local before = #fields
    for _ = 1, tonumber(ARGV[entries]) do
      local key, count = tonumber(ARGV[from]), tonumber(ARGV[from + 1])
      local stop = from + 1 + count
      for index = 1, count do
        fields[before + index] = ARGV[from + 1 + index]
      end
      local id
      if key == 4 and kept ~= '0' then
        id = redis.call('XADD', KEYS[key], 'MAXLEN', '~', kept, '*', unpack(fields, 1, before + count))
      else
        id = redis.call('XADD', KEYS[key], '*', unpack(fields, 1, before + count))
      end
      added[#added + 1] = {KEYS[key], id}
      from = stop + 1
    end
    if halt == '+' then
      redis.call('HSET', KEYS[3], stream, redis.call('TIME')[1])
    end
    if ARGV[8] == '1' then
      for index = first, last do
        redis.call('XDEL', topic, ARGV[index])
      end
    end
  end

  local function write_if_met()
    local header = redis.call('GETRANGE', KEYS[pair], 0, 95)
    local is_stream = header ~= '' and string.byte(header, 6) ~= DELETED
    if (is_stream and string.sub(header, 33, 56) or '') ~= ARGV[chunk] then
      return header == '' and {0} or {0, header}
    end
    write_entries()
    return {1}
  end

  local function write_with_history(header)
    write_entries()
    keep_history(KEYS[pair], KEYS[pair + 2], KEYS[pair + 3], header, ARGV[chunk + 1],
      ARGV[chunk + 3], tonumber(ARGV[chunk + 4]), tonumber(ARGV[chunk + 5]))
  end

  local ok, result
  if kind == '1' or kind == '3' then
    ok, result = pcall(compare_and_set, KEYS[pair], KEYS[pair + 1], ARGV[chunk], ARGV[chunk + 1],
      ARGV[chunk + 2], kind == '1' and write_entries or write_with_history)
    pair = pair + (kind == '1' and 2 or 4)
  elseif kind == '2' then
    ok, result = pcall(write_if_met)
    pair = pair + 2
  else
    ok, result = pcall(write_entries)
    result = ok and {1} or result
  end
  if not ok then
    undo(first, acknowledged, added)
    if type(result) == 'table' then
      result = result.err
    end
    result = {-1, tostring(result)}
  end
  results[#results + 1] = result
end
return {results}
