-- Compare-and-set of many streams in one call, as `commit.lua`, with their histories.
--
-- KEYS     for each stream: its state key, its reply key, and the two keys of its history
-- ARGV[1], ARGV[2]  as of `compare_and_set.lua`, which precedes this text with `history.lua`
-- ARGV[3]  events, ARGV[4]  snapshots, as of `keep_history`
-- ARGV[5..] for each stream: expected, state, reply, as of `compare_and_set`; entry, as of
--          `keep_history`
--
-- Returns what `commit.lua` returns. State and history are written together or not at all.

local events, snapshots = tonumber(ARGV[3]), tonumber(ARGV[4])
local results = {}
for i = 1, #KEYS / 4 do
  local key, at = 4 * i - 3, 4 * i + 1
  local ok, result = pcall(
    compare_and_set, KEYS[key], KEYS[key + 1], ARGV[at], ARGV[at + 1], ARGV[at + 2],
    function(header)
      keep_history(KEYS[key], KEYS[key + 2], KEYS[key + 3], header, ARGV[at + 1], ARGV[at + 3],
        events, snapshots)
    end)
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
