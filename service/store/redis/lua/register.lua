-- Register streams under an access key, as far as its quota allows.
--
-- KEYS[1]  usage of the key: a hash of streams to "bytes:registration", with the sum of the bytes
--          as field "total", which is no stream's
-- ARGV[1]  most streams; "0": any number
-- ARGV[2]  most bytes; "0": any number
-- ARGV[3]  the registration, a random number: it replaces an earlier one of the stream
-- ARGV[4..] for each stream: its field, its bytes
--
-- Returns {streams, bytes, results}; a result is 1 if the stream is registered, else 0

local most, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local stored_total = redis.call('HGET', KEYS[1], 'total')
local total = tonumber(stored_total or '0')
local count = redis.call('HLEN', KEYS[1]) - (stored_total and 1 or 0)
local results = {}
for index = 4, #ARGV, 2 do
  local field, bytes = ARGV[index], tonumber(ARGV[index + 1])
  local before = redis.call('HGET', KEYS[1], field)
  local more = before and 0 or 1
  local change = bytes - (before and tonumber(string.match(before, '^%d+')) or 0)
  if (most > 0 and more > 0 and count >= most)
    or (most_bytes > 0 and change > 0 and total + change > most_bytes) then
    results[#results + 1] = 0
  else
    count, total = count + more, total + change
    redis.call('HSET', KEYS[1], field, ARGV[index + 1] .. ':' .. ARGV[3])
    redis.call('HSET', KEYS[1], 'total', string.format('%d', total))
    results[#results + 1] = 1
  end
end
return {count, total, results}
