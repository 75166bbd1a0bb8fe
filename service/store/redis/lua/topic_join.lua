-- Announce a consumer to the others of its group, or remove it.
--
-- KEYS[1]  the members: a hash of consumers to the times of their last announcements
-- ARGV[1]  the consumer
-- ARGV[2]  for how many milliseconds an announcement is valid; "0": the consumer leaves
--
-- Returns the members whose announcements are valid.
--
-- Times are milliseconds of the server's clock.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[2] == '0' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', now + ARGV[2]))
end
local members, fields = {}, redis.call('HGETALL', KEYS[1])
for index = 1, #fields, 2 do
  if tonumber(fields[index + 1]) > now then
    members[#members + 1] = fields[index]
  else
    redis.call('HDEL', KEYS[1], fields[index])
  end
end
return members
