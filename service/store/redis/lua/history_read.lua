-- Read a stream with its history.
--
-- KEYS[1]  state key
-- KEYS[2], KEYS[3]  keys of its history (`history.lua`)
-- ARGV[1]  fingerprint of a version
-- ARGV[2]  a position; "": no snapshot is read; "*": all are
--
-- Returns {state}, the state nil if there is none, if the history is not valid; otherwise
--   {state, index of the snapshots, entries, snapshots, state for the version}
-- with entries without their tags, the newest snapshot that the version wrote at or before the
-- position, and "" for no state.

local state = redis.call('GET', KEYS[1])
local head = redis.call('HGET', KEYS[3], 'head')
if not state or not head or string.sub(head, 1, 24) ~= string.sub(state, 33, 56) then
  return {state}
end
local index, position, snapshots = string.sub(head, 25), tonumber(ARGV[2]), {}
for at = #index - 15, 1, -16 do
  local is_wanted = ARGV[2] == '*'
  if position then
    is_wanted = #snapshots == 0 and (struct.unpack('<I8', index, at)) <= position
      and string.sub(index, at + 8, at + 15) == string.sub(ARGV[1], 1, 8)
  end
  if is_wanted then
    snapshots[#snapshots + 1] = redis.call('HGET', KEYS[3], 's' .. string.sub(index, at, at + 7))
  end
end
local own = redis.call('HGET', KEYS[3], 'v' .. ARGV[1])
local entries = redis.call('LRANGE', KEYS[2], 0, -1)
for at, entry in ipairs(entries) do
  entries[at] = string.sub(entry, 9)
end
return {state, index, entries, snapshots, own or ''}
