-- Lease tokens of a bucket to a process, and deduct those that it has spent.
--
-- KEYS[1]  the bucket: a hash of "level", its tokens at the time "at", those that are leased
--          included; and of each process its lease, as "tokens:time"
-- ARGV[1]  tokens that are added per second
-- ARGV[2]  most tokens
-- ARGV[3]  the process
-- ARGV[4]  tokens that it has spent since its last lease
--
-- Returns {tokens, free, processes}: the tokens of the lease, those that are leased to nobody, and
-- how many processes used the bucket lately; tokens as strings, since they are fractions.
--
-- Times are milliseconds of the server's clock. A lease is valid for a second; a process that still
-- gets requests renews it after at most half a second. It is half of the free tokens, so that another
-- process finds some, too. Less than one token is never leased: no request could spend it.

local LEASE_MS, PROCESS_MS = 1000, 5000

local rate, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local level, at, leased, processes = most, now, 0, 1
local fields = redis.call('HGETALL', KEYS[1])
for index = 1, #fields, 2 do
  local name, value = fields[index], fields[index + 1]
  if name == 'level' then
    level = tonumber(value)
  elseif name == 'at' then
    at = tonumber(value)
  elseif name ~= ARGV[3] then
    local tokens, since = string.match(value, '^(%S+):(%d+)$')
    -- the clock may be behind, for example after a failover to another server
    local age = math.abs(now - tonumber(since))
    if age >= PROCESS_MS then
      redis.call('HDEL', KEYS[1], name)
    else
      processes = processes + 1
      if age < LEASE_MS then
        leased = leased + tonumber(tokens)
      end
    end
  end
end
level = math.min(most, level + math.max(0, now - at) / 1000 * rate) - tonumber(ARGV[4])
local free, tokens = level - leased, 0
if free >= 1 then
  tokens = math.max(1, free / 2)
end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%d', now),
  ARGV[3], string.format('%.6f:%d', tokens, now))
local full_ms = math.min(1e12, (most - level) / rate * 1000)
redis.call('PEXPIRE', KEYS[1], string.format('%d', PROCESS_MS + full_ms))
return {string.format('%.6f', tokens), string.format('%.6f', free - tokens), processes}
