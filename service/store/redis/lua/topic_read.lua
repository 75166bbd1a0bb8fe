-- Read entries of topics for their owners; each topic succeeds or fails alone.
--
-- KEYS     for each topic: its name, its lease (`topic_lease.lua`)
-- ARGV[1]  the consumer name in the groups, the same for all owners
-- ARGV[2..] for each topic:
--            the consumer group
--            the fence of the owner
--            ">": entries that were never delivered; an id: pending ones behind it
--            most entries
--
-- Returns for each topic: the entries as of XREADGROUP; the stored fence if that is not the owner's;
-- or {-1, text}: failed with this error.

local function read(topic, lease, group, fence, after, most)
  local stored = redis.call('HGET', lease, 'fence')
  if stored ~= fence then
    return stored or ''
  end
  local found = redis.pcall(
    'XREADGROUP', 'GROUP', group, ARGV[1], 'COUNT', most, 'STREAMS', topic, after)
  if found and found.err then
    return {-1, found.err}
  end
  return found and found[1][2] or {}
end

local results = {}
for i = 1, #KEYS / 2 do
  results[i] = read(KEYS[2 * i - 1], KEYS[2 * i], unpack(ARGV, 4 * i - 2, 4 * i + 1))
end
return results
