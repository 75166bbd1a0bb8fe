-- Append entries of a topic to the topic of a partition, each once.
--
-- KEYS[1]  the topic of the partition
-- KEYS[2]  a hash of topics to the ids of their last entries that were appended
-- ARGV[1]  the topic that the entries come from
-- ARGV[2..] for each entry, in order: its id, the number of its fields and values, and these
--
-- Returns how many were appended; the topic already had the others.

-- An id in a form that is ordered as text.
local function in_order(id)
  local time, sequence = string.match(id, '^(%d+)-(%d+)$')
  return string.rep('0', 20 - #time) .. time .. string.rep('0', 20 - #sequence) .. sequence
end

local last = redis.call('HGET', KEYS[2], ARGV[1]) or '0-0'
local at, count, newest = 2, 0, last
while at <= #ARGV do
  local stop = at + 1 + ARGV[at + 1]
  if in_order(ARGV[at]) > in_order(last) then
    redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 2, stop))
    count, newest = count + 1, ARGV[at]
  end
  at = stop + 1
end
if count > 0 then
  redis.call('HSET', KEYS[2], ARGV[1], newest)
end
return count
