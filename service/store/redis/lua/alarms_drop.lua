-- Remove a stream from an index of open alarms, if its state is still the one in which it has none.
--
-- KEYS[1]  state key
-- KEYS[2]  the index
-- ARGV[1]  epoch and tag of the state; "": none is stored
-- ARGV[2]  the stream

if redis.call('GETRANGE', KEYS[1], 32, 55) == ARGV[1] then
  redis.call('ZREM', KEYS[2], ARGV[2])
end
return 1
