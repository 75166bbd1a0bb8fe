-- Read entries of a topic for its owner.
--
-- KEYS[1]  the topic
-- KEYS[2]  its lease (`topic_lease.lua`)
-- ARGV[1]  the consumer group
-- ARGV[2]  the consumer of the group that all owners are
-- ARGV[3]  the fence of the owner
-- ARGV[4]  ">": entries that were never delivered; an id: pending ones behind it
-- ARGV[5]  most entries
--
-- Returns the entries as of XREADGROUP; or the stored fence if that is not the owner's.

local stored = redis.call('HGET', KEYS[2], 'fence')
if stored ~= ARGV[3] then
  return stored or ''
end
local read = redis.call(
  'XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[5], 'STREAMS', KEYS[1], ARGV[4])
if not read then
  return {}
end
return read[1][2]
