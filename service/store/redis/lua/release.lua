-- Remove streams from the usage of an access key (`register.lua`).
--
-- KEYS[1]  usage of the key
-- ARGV[1]  latest registration that is removed, epoch seconds
-- ARGV[2..] the fields of the streams

for index = 2, #ARGV do
  local value = redis.call('HGET', KEYS[1], ARGV[index])
  if value then
    local bytes, registered = string.match(value, '^(%d+):(%d+)$')
    if tonumber(registered) <= tonumber(ARGV[1]) then
      local total = tonumber(redis.call('HGET', KEYS[1], 'total')) - tonumber(bytes)
      redis.call('HDEL', KEYS[1], ARGV[index])
      redis.call('HSET', KEYS[1], 'total', string.format('%d', total))
    end
  end
end
return 1
