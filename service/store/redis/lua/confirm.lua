-- Reads one stream and its reply, and writes, so that a WAIT after it waits until the replicas have
-- all earlier writes.
--
-- KEYS[1]  state key
-- KEYS[2]  reply key
-- ARGV[1]  new TTL of the reply in milliseconds, more than 0
--
-- Returns {state, reply}, nil for a missing one.
--
-- The write changes nothing but the reply's TTL. Without a reply, the state's first byte is
-- overwritten by itself, which is replicated like any write.

local found = redis.call('MGET', KEYS[1], KEYS[2])
if found[2] then
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
elseif found[1] and found[1] ~= '' then
  redis.call('SETRANGE', KEYS[1], 0, string.sub(found[1], 1, 1))
end
return found
