-- Write the report of a process, and read those of all processes that are alive.
--
-- KEYS[1]  the reports, as fields by process: milliseconds of the server's clock, ":", the report
-- ARGV[1]  the process
-- ARGV[2]  its report; empty if it stops
-- ARGV[3]  milliseconds after which a report is of a process that has ended
--
-- Returns the reports of processes that are alive; the others are deleted.

local live_ms = tonumber(ARGV[3])

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%d:', now) .. ARGV[2])
  redis.call('PEXPIRE', KEYS[1], 6 * live_ms)
end
local fields = redis.call('HGETALL', KEYS[1])
local reports = {}
for index = 1, #fields, 2 do
  local since, report = string.match(fields[index + 1], '^(%d+):(.*)$')
  -- the clock may be behind, for example after a failover to another server
  if math.abs(now - tonumber(since)) >= live_ms then
    redis.call('HDEL', KEYS[1], fields[index])
  else
    reports[#reports + 1] = report
  end
end
return reports
