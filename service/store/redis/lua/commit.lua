-- Compare-and-set of many streams in one call; each succeeds or fails independently.
--
-- KEYS     for each stream: its state key, its reply key
-- ARGV[1], ARGV[2]  as of `compare_and_set.lua`, which precedes this text
-- ARGV[3..] for each stream: expected, state, reply, as of `compare_and_set`
--
-- Returns one array per stream, in order: the result of `compare_and_set`, or
--   {-1, text}   failed with this error of the server; the state is unchanged

local results = {}
for i = 1, #KEYS / 2 do
  local ok, result = pcall(
    compare_and_set, KEYS[2 * i - 1], KEYS[2 * i], ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2])
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
