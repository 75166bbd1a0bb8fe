-- Shared by the scripts that commit: compare-and-set of one stream.
--
-- ARGV[1]  TTL of a state in milliseconds; "0": none
-- ARGV[2]  TTL of a reply in milliseconds, more than 0; then ":" and N, if N streams have a change
--          of the index of open alarms: the last N keys are their indexes, and the last 3 N
--          arguments the state key, the name of the stream, and the change, as of `index_alarm`.
--          The scripts do not see these.
--
-- Bytes are compared as bytes; nothing in a state is read as a number. A state is never created if
-- one was expected.

local idle_ms, reply_ms, changes = ARGV[1], string.match(ARGV[2], '^(%d+):?(%d*)$')
local alarms = {}
for _ = 1, tonumber(changes) or 0 do
  local change, stream, state_key = table.remove(ARGV), table.remove(ARGV), table.remove(ARGV)
  alarms[state_key] = {table.remove(KEYS), stream, change}
end

-- Change an index of open alarms, a sorted set of streams by the time at which the alarm opened.
-- An error is ignored: the state is written by then, and the next chunk in alarm adds the stream.
-- The newest 4,096 streams stay: those that expired or were deleted in alarm would grow without end.
--
-- change  "-" removes the stream; a time in milliseconds sets it; "+" and a time adds it if it is
--         missing
local function index_alarm(index_key, stream, change)
  if change == '-' then
    redis.pcall('ZREM', index_key, stream)
    return
  end
  if string.sub(change, 1, 1) == '+' then
    redis.pcall('ZADD', index_key, 'NX', string.sub(change, 2), stream)
  else
    redis.pcall('ZADD', index_key, change, stream)
  end
  redis.pcall('ZREMRANGEBYRANK', index_key, 0, -4097)
  if idle_ms ~= '0' then
    redis.pcall('PEXPIRE', index_key, idle_ms)
  end
end

-- expected  epoch and tag, the 24 bytes at offset 32 of the stored header; "": the state must not
--           exist
-- state     the bytes to write, header and values
-- reply     the bytes to write; "": none, and a stored reply is deleted
-- on_match  called with the stored header before the first write, if the expected state is stored;
--           nil: nothing is called. After an error in it the state is unchanged.
--
-- Returns
--   {1}          written, the reply before the state; a reply is deleted after it
--   {0}          not written, there is no state
--   {0, header}  not written, with at most the first 96 bytes of the stored state
local function compare_and_set(state_key, reply_key, expected, state, reply, on_match)
  local header = redis.call('GETRANGE', state_key, 0, 95)
  if header == '' then
    if redis.call('EXISTS', state_key) == 1 then
      return {0, header}
    end
    if expected ~= '' then
      return {0}
    end
  elseif expected == '' or string.sub(header, 33, 56) ~= expected then
    return {0, header}
  end
  if on_match then
    on_match(header)
  end
  if reply ~= '' then
    redis.call('SET', reply_key, reply, 'PX', reply_ms)
  end
  if idle_ms == '0' then
    redis.call('SET', state_key, state)
  else
    redis.call('SET', state_key, state, 'PX', idle_ms)
  end
  if reply == '' then
    -- not before the state: a full server lets a script go on that has written, if only this
    redis.call('DEL', reply_key)
  end
  if alarms[state_key] then
    index_alarm(unpack(alarms[state_key]))
  end
  return {1}
end

