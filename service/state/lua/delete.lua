-- Replaces one stream by a tombstone and deletes its reply, if it is what is expected.
--
-- KEYS[1]  state key
-- KEYS[2]  reply key
-- ARGV[1]  expected: how the 24 bytes at offset 32 of the value must begin, where a state has
--          epoch and tag; zeros stand for bytes that the value does not have. "": there must
--          be no value
-- ARGV[2]  the tombstone
-- ARGV[3]  how long it is kept, milliseconds, more than 0
--
-- Returns
--   {1}          written
--   {0}          not written, there is no value
--   {0, header}  not written, at most the first 96 bytes of the value that was found; where it
--                is of another type than a string, 32 zeros and the server's words for that
--
-- The deletion comes first: a server whose memory is full lets a script that has written go on.

local header = redis.pcall('GETRANGE', KEYS[1], 0, 95)
if type(header) == 'table' then
  if string.sub(header.err, 1, 9) ~= 'WRONGTYPE' then
    return header
  end
  header = string.rep('\0', 32) .. header.err
end
local mark = ''
if header ~= '' or redis.call('EXISTS', KEYS[1]) == 1 then
  mark = string.sub(header, 33, 56)
  mark = mark .. string.rep('\0', 24 - #mark)
end
local expected = ARGV[1]
if mark == '' and expected ~= '' then
  return {0}
end
if mark ~= '' and (expected == '' or string.sub(mark, 1, #expected) ~= expected) then
  return {0, header}
end
redis.call('UNLINK', KEYS[1], KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {1}
