-- Replaces one stream by a tombstone and deletes its reply and its history, if the stored head is
-- the expected one.
--
-- KEYS[1]  state key
-- KEYS[2]  reply key
-- KEYS[3], KEYS[4]  keys of its history
-- ARGV[1]  expected: prefix of bytes 32 to 55 of the stored value, epoch and tag of a state; a
--          shorter value is padded with zeros. "": no value may be stored
-- ARGV[2]  the tombstone
-- ARGV[3]  its TTL in milliseconds, more than 0
--
-- Returns
--   {1}          written
--   {0}          not written, no value is stored
--   {0, header}  not written, with at most the first 96 bytes of the stored value; for a value
--                that is not a string, 32 zeros and the server's error message
--
-- UNLINK comes first: a server whose memory is full rejects writes of a script until the script has
-- freed memory.

local header = redis.pcall('GETRANGE', KEYS[1], 0, 95)
if type(header) == 'table' then
  if string.sub(header.err, 1, 9) ~= 'WRONGTYPE' then
    return header
  end
  header = string.rep('\0', 32) .. header.err
end
local head = ''
if header ~= '' or redis.call('EXISTS', KEYS[1]) == 1 then
  head = string.sub(header, 33, 56)
  head = head .. string.rep('\0', 24 - #head)
end
local expected = ARGV[1]
if head == '' and expected ~= '' then
  return {0}
end
if head ~= '' and (expected == '' or string.sub(head, 1, #expected) ~= expected) then
  return {0, header}
end
redis.call('UNLINK', unpack(KEYS))
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {1}
