-- Admits as many of the wanted requests as every limit allows, and charges them to all limits or to none.
--
-- KEYS     1, 2: the buckets of requests and tokens, each "<level> <as of> <largest>"
--          3: the day, a hash of slots with their requests, their total, the first and the last slot
-- ARGV     1 requests wanted, 2 tokens of each; 3, 4 requests and tokens in local permits
--          5-7 for requests, 8-10 for tokens: interval (0: no limit), base, largest
--          11 requests a day (0: no limit)
-- Returns  requests and tokens charged; where none, microseconds until there is room for one
--
-- Levels and intervals are whole picoseconds, times whole microseconds: all of them below 2^53, where
-- the doubles that Lua counts with are exact.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local wanted, each = tonumber(ARGV[1]), tonumber(ARGV[2])
local held = { tonumber(ARGV[3]), tonumber(ARGV[4]) }
local admitted, wait = wanted, 0

-- Applies a limit that allows `count` requests now; if none, it allows one after `microseconds`.
local function allow(count, microseconds)
  admitted = math.min(admitted, math.max(count, 0))
  if count < 1 then
    wait = math.max(wait, math.ceil(microseconds))
  end
end

local buckets = {}
for i, amount in ipairs({ 1, each }) do
  local interval = tonumber(ARGV[2 + 3 * i])
  if interval > 0 and amount > 0 then
    local level, largest = 0, tonumber(ARGV[4 + 3 * i])
    local kept = redis.call('GET', KEYS[i])
    if kept then
      local before, as_of, most = string.match(kept, '^(%d+) (%d+) (%d+)$')
      -- After two minutes any bucket has drained. A clock that was set back drains nothing.
      local elapsed = math.min(math.max(now - as_of, 0), 120000000)
      level = math.max(before - elapsed * 1000000, 0)
      largest = math.max(largest, tonumber(most))
    end
    buckets[i] = { interval = interval, level = level, largest = largest }
    local limit = math.max(tonumber(ARGV[3 + 3 * i]) - largest, 0)
    local over = level - held[i] * interval - limit
    allow(math.floor(-over / (amount * interval)) + 1, over / 1000000)
  end
end

local SLOT, DAY = 300000000, 288
local day, per_day = nil, tonumber(ARGV[11])
if per_day > 0 then
  local kept = redis.call('HMGET', KEYS[3], 'total', 'first', 'last')
  local total, first, last = tonumber(kept[1] or 0), tonumber(kept[2] or 0), tonumber(kept[3] or 0)
  -- A clock that was set back counts into the newest slot.
  local slot = math.max(math.floor(now / SLOT), last)
  if slot - last > DAY then
    redis.call('DEL', KEYS[3])
    total, first = 0, slot
  end
  -- A slot is forgotten when its end is a day ago.
  local forgotten = {}
  while first < slot do
    local count = tonumber(redis.call('HGET', KEYS[3], first) or 0)
    if count > 0 and first >= slot - DAY then
      break
    end
    total = total - count
    forgotten[#forgotten + 1] = first
    first = first + 1
  end
  if #forgotten > 0 then
    redis.call('HDEL', KEYS[3], unpack(forgotten))
  end
  day = { slot = slot, total = total, first = first }
  allow(per_day - total + held[1], (first + DAY + 1) * SLOT - now)
end

if admitted < 1 then
  -- A key that is not there yet would have no end.
  if day and redis.call('EXISTS', KEYS[3]) == 1 then
    redis.call('HSET', KEYS[3], 'total', day.total, 'first', day.first)
  end
  return { 0, 0, wait }
end

local charged = { math.max(admitted - held[1], 0), math.max(admitted * each - held[2], 0) }
for i, bucket in pairs(buckets) do
  local level = bucket.level + charged[i] * bucket.interval
  local kept = string.format('%.0f %.0f %.0f', level, now, bucket.largest)
  redis.call('SET', KEYS[i], kept, 'PX', 120000)
end
if day then
  redis.call('HINCRBY', KEYS[3], day.slot, charged[1])
  redis.call('HSET', KEYS[3], 'total', day.total + charged[1], 'first', day.first, 'last', day.slot)
  redis.call('EXPIRE', KEYS[3], 2 * 86400)
end
return { charged[1], charged[2], 0 }
