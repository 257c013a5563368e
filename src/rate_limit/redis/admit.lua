-- Admits up to a given number of requests, as many as all limits allow, and charges them to every limit.
--
-- KEYS     1, 2: the buckets of requests and of tokens, each "<level> <time of the update> <largest>"
--          3: the day, a hash: number of requests of each slot, their total, the first and the last slot
-- ARGV     1 number of requests, 2 tokens of each request
--          3, 4 requests and tokens in the unused local permits of the process
--          5-7 for requests, 8-10 for tokens: interval (0: no limit), burst, largest request
--          11 requests per day (0: no limit)
-- Returns  requests charged, tokens charged, and, if no request is admitted, microseconds until one is
--
-- Levels and intervals are integers in picoseconds, and times are integers in microseconds. All are below 2^53,
-- so that the doubles of Lua represent them exactly.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local requested, tokens_each = tonumber(ARGV[1]), tonumber(ARGV[2])
local unused = { tonumber(ARGV[3]), tonumber(ARGV[4]) }
local admitted, wait = requested, 0

-- Applies a limit that allows `count` requests now or, if `count` is less than 1, one request after `microseconds`.
local function allow(count, microseconds)
  admitted = math.min(admitted, math.max(count, 0))
  if count < 1 then
    wait = math.max(wait, math.ceil(microseconds))
  end
end

local buckets = {}
for i, amount in ipairs({ 1, tokens_each }) do
  local interval = tonumber(ARGV[2 + 3 * i])
  if interval > 0 and amount > 0 then
    local level, largest = 0, tonumber(ARGV[4 + 3 * i])
    local stored = redis.call('GET', KEYS[i])
    if stored then
      local stored_level, updated, stored_largest = string.match(stored, '^(%d+) (%d+) (%d+)$')
      -- Within two minutes every bucket drains. If the clock was set back, nothing drains.
      local elapsed = math.min(math.max(now - updated, 0), 120000000)
      level = math.max(stored_level - elapsed * 1000000, 0)
      largest = math.max(largest, tonumber(stored_largest))
    end
    buckets[i] = { interval = interval, level = level, largest = largest }
    local limit = math.max(tonumber(ARGV[3 + 3 * i]) - largest, 0)
    local excess = level - unused[i] * interval - limit
    allow(math.floor(-excess / (amount * interval)) + 1, excess / 1000000)
  end
end

local SLOT, DAY = 300000000, 288
local day, per_day = nil, tonumber(ARGV[11])
if per_day > 0 then
  local stored = redis.call('HMGET', KEYS[3], 'total', 'first', 'last')
  local total, first, last = tonumber(stored[1] or 0), tonumber(stored[2] or 0), tonumber(stored[3] or 0)
  -- If the clock was set back, requests count in the last slot.
  local slot = math.max(math.floor(now / SLOT), last)
  if slot - last > DAY then
    redis.call('DEL', KEYS[3])
    total, first = 0, slot
  end
  -- A slot is removed 24 hours after its end.
  local expired = {}
  while first < slot do
    local count = tonumber(redis.call('HGET', KEYS[3], first) or 0)
    if count > 0 and first >= slot - DAY then
      break
    end
    total = total - count
    expired[#expired + 1] = first
    first = first + 1
  end
  if #expired > 0 then
    redis.call('HDEL', KEYS[3], unpack(expired))
  end
  day = { slot = slot, total = total, first = first }
  allow(per_day - total + unused[1], (first + DAY + 1) * SLOT - now)
end

if admitted < 1 then
  -- HSET would create a missing key without an expiry time.
  if day and redis.call('EXISTS', KEYS[3]) == 1 then
    redis.call('HSET', KEYS[3], 'total', day.total, 'first', day.first)
  end
  return { 0, 0, wait }
end

local charged = { math.max(admitted - unused[1], 0), math.max(admitted * tokens_each - unused[2], 0) }
for i, bucket in pairs(buckets) do
  local level = bucket.level + charged[i] * bucket.interval
  local stored = string.format('%.0f %.0f %.0f', level, now, bucket.largest)
  redis.call('SET', KEYS[i], stored, 'PX', 120000)
end
if day then
  redis.call('HINCRBY', KEYS[3], day.slot, charged[1])
  redis.call('HSET', KEYS[3], 'total', day.total + charged[1], 'first', day.first, 'last', day.slot)
  redis.call('EXPIRE', KEYS[3], 2 * 86400)
end
return { charged[1], charged[2], 0 }
