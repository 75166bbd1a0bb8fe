-- Read the newest entries of indexes of open alarms (`compare_and_set.lua`).
--
-- KEYS     the indexes
-- ARGV[1]  only entries of an earlier time: a time in milliseconds, or "+inf"
-- ARGV[2]  most entries of each index; it may return more if they have the same time
-- ARGV[3]  only streams whose names start with this
--
-- Returns the time from which on these are all entries of every index, "-inf" if they are all there
-- are; then streams and times in turns, each index by itself newest first. A stream may come twice.

local most, results, complete_from = tonumber(ARGV[2]), {'-inf'}, -math.huge
local prefix = ARGV[3]
local step = prefix == '' and most or 4096 -- the most that an index has
for _, key in ipairs(KEYS) do
  local entries = redis.call(
    'ZREVRANGEBYSCORE', key, '(' .. ARGV[1], '-inf', 'WITHSCORES', 'LIMIT', 0, step)
  local count, last = 0, nil
  for i = 1, #entries, 2 do
    -- entries of the time at which the count is reached are included
    if count >= most and entries[i + 1] ~= last then
      break
    end
    if string.sub(entries[i], 1, #prefix) == prefix then
      count, last = count + 1, entries[i + 1]
      results[#results + 1] = entries[i]
      results[#results + 1] = last
    end
  end
  if count >= most then
    if tonumber(last) > complete_from then
      results[1], complete_from = last, tonumber(last)
    end
    if prefix == '' then
      for _, stream in ipairs(redis.call('ZREVRANGEBYSCORE', key, last, last)) do
        results[#results + 1] = stream
        results[#results + 1] = last
      end
    end
  end
end
return results
