-- Read the newest entries of indexes of open alarms (`compare_and_set.lua`).
--
-- KEYS     the indexes
-- ARGV[1]  only entries of an earlier time: a time in milliseconds, or "+inf"
-- ARGV[2]  most entries of each index; it may return more if they have the same time
--
-- Returns streams and times in turns, each index by itself newest first. A stream may come twice.

local most, results = tonumber(ARGV[2]), {}
for _, key in ipairs(KEYS) do
  local entries = redis.call(
    'ZREVRANGEBYSCORE', key, '(' .. ARGV[1], '-inf', 'WITHSCORES', 'LIMIT', 0, most)
  for _, each in ipairs(entries) do
    results[#results + 1] = each
  end
  if #entries == 2 * most then
    local last = entries[#entries]
    for _, stream in ipairs(redis.call('ZREVRANGEBYSCORE', key, last, last)) do
      results[#results + 1] = stream
      results[#results + 1] = last
    end
  end
end
return results
