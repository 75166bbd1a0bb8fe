-- Read the newest entries of indexes of open alarms (`compare_and_set.lua`).
--
-- KEYS     the indexes
-- ARGV[1]  only entries of an earlier time: a time in milliseconds, or "+inf"
-- ARGV[2]  most entries of each index; it may return more if they have the same time
--
-- Returns the time from which on these are all entries of every index, "-inf" if they are all there
-- are; then streams and times in turns, each index by itself newest first. A stream may come twice.

local most, results, complete_from = tonumber(ARGV[2]), {'-inf'}, -math.huge
for _, key in ipairs(KEYS) do
  local entries = redis.call(
    'ZREVRANGEBYSCORE', key, '(' .. ARGV[1], '-inf', 'WITHSCORES', 'LIMIT', 0, most)
  for _, each in ipairs(entries) do
    results[#results + 1] = each
  end
  if #entries == 2 * most then
    local last = entries[#entries]
    if tonumber(last) > complete_from then
      results[1], complete_from = last, tonumber(last)
    end
    for _, stream in ipairs(redis.call('ZREVRANGEBYSCORE', key, last, last)) do
      results[#results + 1] = stream
      results[#results + 1] = last
    end
  end
end
return results
