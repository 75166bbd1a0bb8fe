-- Read streams with their histories.
--
-- KEYS     for each stream: its state key, and the two keys of its history (`history.lua`)
-- ARGV[1]  fingerprint of a version
-- ARGV[2]  a position; "": no snapshot is read; "*": all are
--
-- Returns for each stream, in order: {state}, the state nil if there is none, if the history is not
-- valid; otherwise
--   {state, index of the snapshots, entries, snapshots, state for the version}
-- with entries without their tags, the newest snapshot that the version wrote at or before the
-- position, and "" for no state. All snapshots are returned newest first. A key of another type
-- counts as none.

local position = tonumber(ARGV[2])

local function read(state_key, history_key, versions_key)
  local state = redis.call('GET', state_key)
  local head = redis.call('HGET', versions_key, 'head')
  if not state or not head or string.sub(head, 1, 24) ~= string.sub(state, 33, 56) then
    return {state}
  end
  local index, snapshots = string.sub(head, 25), {}
  for at = #index - 15, 1, -16 do
    local is_wanted = ARGV[2] == '*'
    if position then
      is_wanted = #snapshots == 0 and (struct.unpack('<I8', index, at)) <= position
        and string.sub(index, at + 8, at + 15) == string.sub(ARGV[1], 1, 8)
    end
    if is_wanted then
      local field = 's' .. string.sub(index, at, at + 7)
      snapshots[#snapshots + 1] = redis.call('HGET', versions_key, field)
    end
  end
  local own = redis.call('HGET', versions_key, 'v' .. ARGV[1])
  local entries = redis.call('LRANGE', history_key, 0, -1)
  for at, entry in ipairs(entries) do
    entries[at] = string.sub(entry, 9)
  end
  return {state, index, entries, snapshots, own or ''}
end

local results = {}
for i = 1, #KEYS / 3 do
  local ok, result = pcall(read, KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i])
  if not ok then
    local state = redis.pcall('GET', KEYS[3 * i - 2])
    result = {type(state) == 'string' and state}
  end
  results[i] = result
end
return results
