-- Reads one stream and its reply, and writes, so that a wait for replicas behind it waits for all
-- that was written before.
--
-- KEYS[1]  state key
-- KEYS[2]  reply key
-- ARGV[1]  how long the reply is kept from now on, milliseconds, more than 0
--
-- Returns {state, reply}, nil where there is none.
--
-- What is written changes nothing but the reply's lifetime. Where no reply is kept, the state's
-- first byte is written over itself, which goes to the replicas like any write.

local found = redis.call('MGET', KEYS[1], KEYS[2])
if found[2] then
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
elseif found[1] and found[1] ~= '' then
  redis.call('SETRANGE', KEYS[1], 0, string.sub(found[1], 1, 1))
end
return found
