-- Compare-and-set of many streams in one call; each succeeds or fails independently.
--
-- KEYS     for each stream: its state key, its reply key
-- ARGV[1]  TTL of a state in milliseconds; "0": none
-- ARGV[2]  TTL of a reply in milliseconds, more than 0
-- ARGV[3..] for each stream:
--            expected  epoch and tag, the 24 bytes at offset 32 of the stored header;
--                      "": the state must not exist
--            state     the bytes to write, header and values
--            reply     the bytes to write; "": none, and a stored reply is deleted
--
-- Returns one array per stream, in order:
--   {1}          written, the reply first and the state last
--   {0}          not written, there is no state
--   {0, header}  not written, with at most the first 96 bytes of the stored state
--   {-1, text}   failed with this error of the server; the state is unchanged
--
-- Bytes are compared as bytes; nothing in a state is read as a number. A state is never created if
-- one was expected.

local idle_ms, reply_ms = ARGV[1], ARGV[2]

local function commit(state_key, reply_key, expected, state, reply)
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
  if reply == '' then
    redis.call('DEL', reply_key)
  else
    redis.call('SET', reply_key, reply, 'PX', reply_ms)
  end
  if idle_ms == '0' then
    redis.call('SET', state_key, state)
  else
    redis.call('SET', state_key, state, 'PX', idle_ms)
  end
  return {1}
end

local results = {}
for i = 1, #KEYS / 2 do
  local ok, result = pcall(
    commit, KEYS[2 * i - 1], KEYS[2 * i], ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2])
  if not ok then
    local text = result
    if type(result) == 'table' then
      text = result.err
    end
    result = {-1, tostring(text)}
  end
  results[i] = result
end
return results
