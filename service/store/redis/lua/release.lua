-- Remove registrations from the usage of an access key (`register.lua`), unless others have
-- replaced them.
--
-- KEYS[1]  usage of the key
-- ARGV[1..] for each registration: the field of its stream, its value

for index = 1, #ARGV, 2 do
  local field, value = ARGV[index], ARGV[index + 1]
  if redis.call('HGET', KEYS[1], field) == value then
    local bytes = tonumber(string.match(value, '^%d+'))
    local total = tonumber(redis.call('HGET', KEYS[1], 'total')) - bytes
    redis.call('HDEL', KEYS[1], field)
    redis.call('HSET', KEYS[1], 'total', string.format('%d', total))
  end
end
return 1
