-- Move dead letters back to their topic as new entries, or delete them.
--
-- KEYS[1]  the topic
-- KEYS[2]  the dead-letter topic
-- KEYS[3]  the streams that halt (`topic_commit.lua`)
-- ARGV[1]  "1": they are added to the topic, without the fields that begin with `carry-`
-- ARGV[2]  a halted stream that continues; "": none
-- ARGV[3]  the id of the last dead letter, with ARGV[2]
-- ARGV[4..] ids of dead letters
--
-- Returns how many there were; or -1, and changes nothing, if there are later dead letters: they may
-- be of the stream, which would continue before they are replayed.

local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if ARGV[2] ~= '' and last and last[1] ~= ARGV[3] then
  return -1
end
local count = 0
for index = 4, #ARGV do
  local letter = redis.call('XRANGE', KEYS[2], ARGV[index], ARGV[index])[1]
  if letter then
    local fields, kept = letter[2], {}
    if fields[#fields - 1] == 'carry-fields' then
      -- of an entry with many fields (`service/consumers/outputs.py`)
      fields = cmsgpack.unpack(fields[#fields])
    end
    for at = 1, #fields, 2 do
      if string.sub(fields[at], 1, 6) ~= 'carry-' then
        kept[#kept + 1] = fields[at]
        kept[#kept + 1] = fields[at + 1]
      end
    end
    if ARGV[1] == '1' and #kept > 0 then
      redis.call('XADD', KEYS[1], '*', unpack(kept))
    end
    redis.call('XDEL', KEYS[2], ARGV[index])
    count = count + 1
  end
end
if ARGV[2] ~= '' then
  redis.call('HDEL', KEYS[3], ARGV[2])
end
return count
