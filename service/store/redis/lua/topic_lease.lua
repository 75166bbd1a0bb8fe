-- Acquire, renew or release the lease of a topic.
--
-- KEYS[1]  the topic
-- KEYS[2]  its lease: a hash of "fence", which identifies one acquisition; "number", how many
--          commits were made under it; "owner"; "until", when it expires; "floor", an id up to
--          which every entry is acknowledged
-- ARGV[1]  "acquire", "renew" or "release"
-- ARGV[2]  the fence: of a new acquisition, or the owner's
-- ARGV[3]  the owner
-- ARGV[4]  duration of the lease in milliseconds
-- ARGV[5]  the consumer group
-- ARGV[6]  acquire: the id behind which a new group starts; else the new floor, "": unknown
-- ARGV[7]  renew: a number that the commits under the fence have reached
--
-- Returns {acquired or held, owner, remaining milliseconds, whether the group was created}
--
-- Times are milliseconds of the server's clock. A repeated acquisition changes nothing. A group that
-- is missing is created behind the floor, and in a new topic at its start. A lease whose commits were
-- lost is not held any more: their entries are pending again.

local action, fence, owner, group = ARGV[1], ARGV[2], ARGV[3], ARGV[5]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stored = redis.call('HMGET', KEYS[2], 'fence', 'owner', 'until', 'floor', 'number')
local left = math.max(0, tonumber(stored[3] or '0') - now)
local is_held = stored[1] == fence

if action == 'acquire' then
  if is_held then
    return {1, owner, left, 0}
  end
  if left > 0 and stored[2] ~= owner then
    return {0, stored[2], left, 0}
  end
  local floor = stored[4] or ARGV[6]
  if redis.call('EXISTS', KEYS[1]) == 0 then
    floor = '0'
  end
  local created = redis.pcall('XGROUP', 'CREATE', KEYS[1], group, floor, 'MKSTREAM')
  if created.err then
    if string.sub(created.err, 1, 9) ~= 'BUSYGROUP' then
      return created
    end
  end
  redis.call('HSET', KEYS[2], 'fence', fence, 'number', '0', 'owner', owner,
    'until', string.format('%d', now + ARGV[4]))
  return {1, owner, tonumber(ARGV[4]), created.err and 0 or 1}
end
if not is_held or tonumber(stored[5]) < tonumber(ARGV[7]) then
  return {0, stored[2] or '', left, 0}
end
if ARGV[6] ~= '' then
  redis.call('HSET', KEYS[2], 'floor', ARGV[6])
end
local lease_ms = action == 'renew' and ARGV[4] or 0
redis.call('HSET', KEYS[2], 'until', string.format('%d', now + lease_ms))
return {1, owner, tonumber(lease_ms), 0}
