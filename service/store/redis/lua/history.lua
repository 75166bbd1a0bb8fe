-- Shared by the scripts that write the history of a stream: its recent events, snapshots of its
-- state, and its states for other versions of the model.
--
-- A history is two keys: a list of entries, one for each of the last chunks, oldest first, and a hash.
-- An entry is the first 8 bytes of the tag before its chunk, which tell the branches of an epoch apart
-- (a lossy failover begins one), and then the bytes of `service.store.history_codec`. The hash:
--   "head"              epoch and tag of the last commit that kept the history, 24 bytes; then for
--                       each snapshot, ascending, its position as in a state, and the first 8 bytes
--                       of the fingerprint of the version that wrote it
--   "s" .. position     the snapshot at this position, a whole state
--   "v" .. fingerprint  the state of the stream for another version, with a head of its own
--
-- It is valid only while this head is that of the stored state, so that a commit that does not keep
-- it, or a lost write of it, makes it invalid and never wrong.

local MAX_VERSION_STATES = 2
local NO_TAG = string.rep('\0', 8)

local function position_of(bytes, at)
  return (struct.unpack('<I8', bytes, at))
end

-- Keep the state of the stream for another version; of too many, the one that is furthest behind is
-- dropped.
local function keep_version(versions_key, value)
  local field = 'v' .. string.sub(value, 17, 32)
  if redis.call('HSET', versions_key, field, value) == 0 then
    return
  end
  local count, last, lowest = 0, nil, math.huge
  for _, each in ipairs(redis.call('HKEYS', versions_key)) do
    if string.sub(each, 1, 1) == 'v' then
      count = count + 1
      local position = position_of(redis.call('HGET', versions_key, each), 57)
      if each ~= field and position < lowest then
        last, lowest = each, position
      end
    end
  end
  if count > MAX_VERSION_STATES then
    redis.call('HDEL', versions_key, last)
  end
end

-- Remove the snapshots beyond a position; returns the index of the others.
local function drop_snapshots(versions_key, index, position)
  local kept = ''
  for at = 1, #index, 16 do
    if position_of(index, at) <= position then
      kept = kept .. string.sub(index, at, at + 15)
    else
      redis.call('HDEL', versions_key, 's' .. string.sub(index, at, at + 7))
    end
  end
  return kept
end

-- Write a snapshot; returns the index with it.
local function add_snapshot(versions_key, index, state)
  redis.call('HSET', versions_key, 's' .. string.sub(state, 57, 64), state)
  return index .. string.sub(state, 57, 64) .. string.sub(state, 17, 24)
end

-- How many of the snapshots to keep are the newest, at equal distances over the events; the others
-- are older.
local function newest_of(most)
  return most - math.floor(most / 4)
end

-- Drop snapshots beyond the number to keep: each time the older one that is missed least, whose
-- neighbours are closest to each other compared with its age, and never the first one; without older
-- ones the first.
local function thin_snapshots(versions_key, index, most)
  while #index > 16 * most do
    -- positions and parts of fingerprints in turns, in one call: each call of a function counts
    local values = {struct.unpack('<' .. string.rep('I8', #index / 8), index)}
    local last, chosen, least = #index / 8 - 1, 1, math.huge
    for at = 3, last - 2 * newest_of(most), 2 do
      local score = (values[at + 2] - values[at - 2]) / (values[last] - values[at])
      if score < least then
        chosen, least = at, score
      end
    end
    local first = 8 * chosen - 7
    redis.call('HDEL', versions_key, 's' .. string.sub(index, first, first + 7))
    index = string.sub(index, 1, first - 1) .. string.sub(index, first + 16)
  end
  return index
end

-- Whether the stream had the head of a value, as far as its entries reach.
local function had_head(header, history_key, value)
  if string.sub(header, 33, 56) == string.sub(value, 33, 56) then
    return true
  end
  local position, at = string.sub(value, 57, 64), -1
  while true do
    local entry = redis.call('LINDEX', history_key, at)
    if not entry then
      return false
    end
    if position_of(entry, 9) <= position_of(position, 1) then
      return string.sub(entry, 9, 16) == position
        and string.sub(entry, 1, 8) == string.sub(value, 41, 48)
    end
    at = at - 1
  end
end

-- Append an entry, and drop the oldest ones while what remains has enough events.
local function append_entry(history_key, tag, entry, stop, most)
  redis.call('RPUSH', history_key, tag .. entry)
  local dropped
  repeat
    dropped = 0
    for _, each in ipairs(redis.call('LRANGE', history_key, 0, 1)) do
      local start, steps = struct.unpack('<I8I4', each, 9)
      if stop - start - steps < most then
        break
      end
      dropped = dropped + 1
    end
    if dropped > 0 then
      redis.call('LTRIM', history_key, dropped, -1)
    end
  until dropped < 2
end

local function write_head(history_key, versions_key, state, index)
  redis.call('HSET', versions_key, 'head', string.sub(state, 33, 56) .. index)
  if idle_ms ~= '0' then
    redis.call('PEXPIRE', history_key, idle_ms)
    redis.call('PEXPIRE', versions_key, idle_ms)
  end
end

-- Keep the history of a stream whose state is about to be written.
--
-- header     of the stored state or tombstone; "": there is none
-- state      to write
-- entry      of the chunk; unused without events
-- events     about how many events are kept; 0: only the states for other versions
-- snapshots  how many snapshots are kept, at least 1
local function keep_history(
  state_key, history_key, versions_key, header, state, entry, events, snapshots)
  local before, index = string.sub(header, 33, 56), ''
  local is_continued = string.sub(before, 1, 8) == string.sub(state, 33, 40)
  local head = redis.call('HGET', versions_key, 'head')
  if is_continued and head and string.sub(head, 1, 24) == before then
    index = string.sub(head, 25)
  else
    redis.call('UNLINK', history_key, versions_key)
  end
  if is_continued and string.sub(header, 17, 32) ~= string.sub(state, 17, 32) then
    keep_version(versions_key, redis.call('GET', state_key))
    redis.call('HDEL', versions_key, 'v' .. string.sub(state, 17, 32))
  end
  if events == 0 then
    redis.call('UNLINK', history_key)
    index = drop_snapshots(versions_key, index, -1)
  else
    if is_continued and index == '' and redis.call('LLEN', history_key) == 0 then
      index = add_snapshot(versions_key, index, redis.call('GET', state_key))
    end
    local position, newest = position_of(state, 57), 0
    local tag = is_continued and string.sub(header, 41, 48) or NO_TAG
    append_entry(history_key, tag, entry, position, events)
    if index ~= '' then
      newest = position_of(index, #index - 15)
    end
    if position - newest >= math.max(1, math.floor(events / newest_of(snapshots))) then
      index = add_snapshot(versions_key, index, state)
      index = thin_snapshots(versions_key, index, snapshots)
    end
  end
  write_head(history_key, versions_key, state, index)
end

