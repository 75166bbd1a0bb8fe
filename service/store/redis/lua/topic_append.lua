-- Append entries of sources to the topic of a partition, each once.
--
-- KEYS[1]  the topic of the partition
-- KEYS[2]  a hash of sources to ids: what a source had up to its id was appended
-- ARGV     for each source: its name; the id that the caller knows to be stored, empty if it knows
--          none; the id up to which it sends the source's entries; their number; and for each, in
--          order: its id, the number of its fields and values, and these
--
-- Returns the length of the topic, and for each source how many were appended (the topic already had
-- the others), or -1 if the store has lost the id that is known: nothing of the source was appended.

-- An id in a form that is ordered as text.
local function in_order(id)
  local time, sequence = string.match(id, '^(%d+)-(%d+)$')
  return string.rep('0', 20 - #time) .. time .. string.rep('0', 20 - #sequence) .. sequence
end

local results, at = {0}, 1
while at <= #ARGV do
  local source, known, upto, entries = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local last = in_order(redis.call('HGET', KEYS[2], source) or '0-0')
  local is_lost = known ~= '' and last < in_order(known)
  local count = 0
  at = at + 4
  for _ = 1, entries do
    local stop = at + 1 + ARGV[at + 1]
    if not is_lost and in_order(ARGV[at]) > last then
      redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 2, stop))
      count = count + 1
    end
    at = stop + 1
  end
  if not is_lost and in_order(upto) > last then
    redis.call('HSET', KEYS[2], source, upto)
  end
  results[#results + 1] = is_lost and -1 or count
end
results[1] = redis.call('XLEN', KEYS[1])
return results
