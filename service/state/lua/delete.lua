-- Deletes one stream and its reply, if it is what is expected.
--
-- KEYS[1]  state key
-- KEYS[2]  reply key
-- ARGV[1]  expected: epoch and tag, the 24 bytes at offset 32 of the header the state must
--          have; "": any state, a damaged one too
--
-- Returns
--   {1}          it was there and is gone
--   {0}          there was no state (a reply left behind is deleted)
--   {0, header}  not deleted, at most the first 96 bytes of the state that was found

if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('UNLINK', KEYS[2])
  return {0}
end
if ARGV[1] ~= '' then
  local header = redis.call('GETRANGE', KEYS[1], 0, 95)
  if string.sub(header, 33, 56) ~= ARGV[1] then
    return {0, header}
  end
end
redis.call('UNLINK', KEYS[1], KEYS[2])
return {1}
