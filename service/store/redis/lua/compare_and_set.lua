-- Shared by the scripts that commit: compare-and-set of one stream.
--
-- ARGV[1]  TTL of a state in milliseconds; "0": none
-- ARGV[2]  TTL of a reply in milliseconds, more than 0
--
-- Bytes are compared as bytes; nothing in a state is read as a number. A state is never created if
-- one was expected.

local idle_ms, reply_ms = ARGV[1], ARGV[2]

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
  return {1}
end

