-- Write the record of a model, unless another process has written one since it was read.
--
-- KEYS[1]  the records of the models, as fields by name, and their version as field ":version"
-- ARGV[1]  the version that was read; empty if there was none
-- ARGV[2]  the next version
-- ARGV[3]  the model
-- ARGV[4]  its record
--
-- Returns 1 if the record was written, else 0.

if (redis.call('HGET', KEYS[1], ':version') or '') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], ':version', ARGV[2], ARGV[3], ARGV[4])
return 1
