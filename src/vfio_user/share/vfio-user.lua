-- Wireshark dissector for vfio-user, for the captures of "vfio-user trace --write".
--
--   tshark -X lua_script:$(vfio-user trace --dissector) -r FILE.pcapng -V
--
-- or put this file into Wireshark's folder for personal plugins. Such a capture has exported PDUs (link type 252) that
-- name this dissector. Each begins with what the bytes of the message do not say: see PREFIX and FD in
-- vfio_user/tools/trace/capture.py. Numbers are little-endian, as on the socket.

local proto = Proto("vfio_user", "vfio-user")

-- Names, as in vfio_user/wire/constants.py

local COMMANDS = {
  [1] = "VERSION", [2] = "DMA_MAP", [3] = "DMA_UNMAP", [4] = "DEVICE_GET_INFO", [5] = "DEVICE_GET_REGION_INFO",
  [6] = "DEVICE_GET_REGION_IO_FDS", [7] = "DEVICE_GET_IRQ_INFO", [8] = "DEVICE_SET_IRQS", [9] = "REGION_READ",
  [10] = "REGION_WRITE", [11] = "DMA_READ", [12] = "DMA_WRITE", [13] = "DEVICE_RESET", [15] = "REGION_WRITE_MULTI",
  [16] = "DEVICE_FEATURE", [17] = "MIG_DATA_READ", [18] = "MIG_DATA_WRITE",
}
local SENDERS = { [0] = "client", [1] = "server" }
local TYPES = { [0] = "command", [1] = "reply" }
local FD_KINDS = {
  [0] = "unknown", [1] = "memfd", [2] = "eventfd", [3] = "socket", [4] = "file", [5] = "pipe", [6] = "device",
}
local REGIONS = {
  [0] = "bar0", [1] = "bar1", [2] = "bar2", [3] = "bar3", [4] = "bar4", [5] = "bar5", [6] = "rom", [7] = "config",
  [8] = "vga",
}
local IRQS = { [0] = "intx", [1] = "msi", [2] = "msix", [3] = "err", [4] = "req" }
local FEATURES = {
  [1] = "MIGRATION", [2] = "MIG_DEVICE_STATE", [6] = "DMA_LOGGING_START", [7] = "DMA_LOGGING_STOP",
  [8] = "DMA_LOGGING_REPORT", [9] = "MIG_DATA_SIZE",
}
local STATES = {
  [0] = "ERROR", [1] = "STOP", [2] = "RUNNING", [3] = "STOP_COPY", [4] = "RESUMING", [5] = "RUNNING_P2P",
  [6] = "PRE_COPY", [7] = "PRE_COPY_P2P",
}

-- Fields

local f = {
  sender = ProtoField.uint8("vfio_user.sender", "Sender", base.DEC, SENDERS),
  twin = ProtoField.bool("vfio_user.twin", "Twin socket"),
  connection = ProtoField.uint32("vfio_user.connection", "Connection"),
  fd_kind = ProtoField.uint8("vfio_user.fd.kind", "File descriptor", base.DEC, FD_KINDS),
  fd_size = ProtoField.uint64("vfio_user.fd.size", "Size of its file", base.HEX),

  id = ProtoField.uint16("vfio_user.id", "Message ID"),
  command = ProtoField.uint16("vfio_user.command", "Command", base.DEC, COMMANDS),
  size = ProtoField.uint32("vfio_user.size", "Message size"),
  flags = ProtoField.uint32("vfio_user.flags", "Flags", base.HEX),
  type = ProtoField.uint32("vfio_user.flags.type", "Type", base.DEC, TYPES, 0xF),
  no_reply = ProtoField.bool("vfio_user.flags.no_reply", "No reply", 32, nil, 0x10),
  error_flag = ProtoField.bool("vfio_user.flags.error", "Error", 32, nil, 0x20),
  error = ProtoField.uint32("vfio_user.error", "Errno"),

  major = ProtoField.uint16("vfio_user.version.major", "Major"),
  minor = ProtoField.uint16("vfio_user.version.minor", "Minor"),
  capabilities = ProtoField.string("vfio_user.version.capabilities", "Capabilities"),

  argsz = ProtoField.uint32("vfio_user.argsz", "argsz"),
  word = ProtoField.uint32("vfio_user.arg_flags", "Flags", base.HEX),
  address = ProtoField.uint64("vfio_user.address", "Address", base.HEX),
  length = ProtoField.uint64("vfio_user.length", "Length", base.HEX),
  file_offset = ProtoField.uint64("vfio_user.file_offset", "Offset in the file", base.HEX),
  regions = ProtoField.uint32("vfio_user.num_regions", "Regions"),
  irqs = ProtoField.uint32("vfio_user.num_irqs", "Interrupt indexes"),
  region = ProtoField.uint32("vfio_user.region", "Region", base.DEC, REGIONS),
  cap_offset = ProtoField.uint32("vfio_user.cap_offset", "Offset of capabilities"),
  irq = ProtoField.uint32("vfio_user.irq", "Interrupt index", base.DEC, IRQS),
  start = ProtoField.uint32("vfio_user.start", "Start"),
  count = ProtoField.uint32("vfio_user.count", "Count"),
  writes = ProtoField.uint64("vfio_user.writes", "Writes"),
  offset = ProtoField.uint64("vfio_user.offset", "Offset", base.HEX),
  feature = ProtoField.uint32("vfio_user.feature", "Feature", base.DEC, FEATURES, 0xFFFF),
  get = ProtoField.bool("vfio_user.feature.get", "Get", 32, nil, 0x10000),
  set = ProtoField.bool("vfio_user.feature.set", "Set", 32, nil, 0x20000),
  probe = ProtoField.bool("vfio_user.feature.probe", "Probe", 32, nil, 0x40000),
  migration = ProtoField.uint64("vfio_user.migration", "Migration flags", base.HEX),
  state = ProtoField.uint32("vfio_user.state", "Device state", base.DEC, STATES),
  page_size = ProtoField.uint64("vfio_user.page_size", "Page size", base.HEX),
  data_size = ProtoField.uint64("vfio_user.data_size", "Size of the state"),
  value = ProtoField.uint64("vfio_user.value", "Value", base.HEX),
  data = ProtoField.bytes("vfio_user.data", "Data"),

  answers = ProtoField.framenum("vfio_user.answers", "Answers", base.NONE, frametype.REQUEST),
  answered = ProtoField.framenum("vfio_user.answered", "Answered in", base.NONE, frametype.RESPONSE),
  time = ProtoField.relative_time("vfio_user.time", "Time since the command"),
}
proto.fields = f

local malformed = ProtoExpert.new("vfio_user.malformed", "Shorter than its command says", expert.group.MALFORMED,
  expert.severity.ERROR)
local refused = ProtoExpert.new("vfio_user.refused", "Refused", expert.group.RESPONSE_CODE, expert.severity.NOTE)
proto.experts = { malformed, refused }

-- Fixed parts of payloads: fields in their order, each with its size in bytes

local ACCESS = { { f.offset, 8 }, { f.region, 4 }, { f.count, 4 } }
local DMA = { { f.address, 8 }, { f.length, 8 } }
local MIG_DATA = { { f.argsz, 4 }, { f.count, 4 } }
local LAYOUTS = {
  [1] = { { f.major, 2 }, { f.minor, 2 } },
  [2] = { { f.argsz, 4 }, { f.word, 4 }, { f.file_offset, 8 }, { f.address, 8 }, { f.length, 8 } },
  [3] = { { f.argsz, 4 }, { f.word, 4 }, { f.address, 8 }, { f.length, 8 } },
  [4] = { { f.argsz, 4 }, { f.word, 4 }, { f.regions, 4 }, { f.irqs, 4 } },
  [5] = {
    { f.argsz, 4 }, { f.word, 4 }, { f.region, 4 }, { f.cap_offset, 4 }, { f.length, 8 }, { f.file_offset, 8 },
  },
  [6] = { { f.argsz, 4 }, { f.word, 4 }, { f.region, 4 }, { f.count, 4 } },
  [7] = { { f.argsz, 4 }, { f.word, 4 }, { f.irq, 4 }, { f.count, 4 } },
  [8] = { { f.argsz, 4 }, { f.word, 4 }, { f.irq, 4 }, { f.start, 4 }, { f.count, 4 } },
  [9] = ACCESS,
  [10] = ACCESS,
  [11] = DMA,
  [12] = DMA,
  [15] = { { f.writes, 8 } },
  [16] = { { f.argsz, 4 }, { f.feature, 4 } },
  [17] = MIG_DATA,
  [18] = MIG_DATA,
}
local NO_REPLY_PAYLOAD = { [2] = true, [8] = true, [18] = true }
local FEATURE_LAYOUTS = {
  [1] = { { f.migration, 8 } },
  [2] = { { f.state, 4 } },
  [6] = { { f.page_size, 8 }, { f.count, 4 } },
  [8] = { { f.address, 8 }, { f.length, 8 }, { f.page_size, 8 } },
  [9] = { { f.data_size, 8 } },
}

-- Adds fields of a layout; gives the offset behind them, or nil where the bytes end before.
local function add_layout(tree, buffer, offset, layout)
  for _, row in ipairs(layout) do
    local field, size = row[1], row[2]
    if offset + size > buffer:len() then return nil end
    tree:add_le(field, buffer(offset, size))
    offset = offset + size
  end
  return offset
end

local function add_data(tree, buffer, offset)
  local size = buffer:len() - offset
  if size <= 0 then return end
  local range = buffer(offset, size)
  if size == 1 or size == 2 or size == 4 or size == 8 then
    tree:add_le(f.value, range)
  else
    tree:add(f.data, range)
  end
end

local function add_feature(tree, buffer, offset)
  local word = buffer(offset - 4, 4)
  tree:add_le(f.get, word)
  tree:add_le(f.set, word)
  tree:add_le(f.probe, word)
  local layout = FEATURE_LAYOUTS[word:le_uint() % 0x10000]
  if layout and offset < buffer:len() then offset = add_layout(tree, buffer, offset, layout) or offset end
  if offset < buffer:len() then tree:add(f.data, buffer(offset)) end
end

local function add_payload(tree, buffer, offset, command, is_reply)
  if offset >= buffer:len() then return end
  local layout = LAYOUTS[command]
  if layout == nil or (is_reply and NO_REPLY_PAYLOAD[command]) then
    tree:add(f.data, buffer(offset))
    return
  end
  local behind = add_layout(tree, buffer, offset, layout)
  if behind == nil then
    tree:add_proto_expert_info(malformed)
  elseif command == 1 then
    if behind < buffer:len() then tree:add(f.capabilities, buffer(behind)) end
  elseif command == 16 then
    add_feature(tree, buffer, behind)
  else
    add_data(tree, buffer, behind)
  end
end

-- Which reply answers which command: found on the first pass, by connection, socket, sender and ID

local pending, request_of, reply_of = {}, {}, {}
function proto.init() pending, request_of, reply_of = {}, {}, {} end

local function match(pinfo, key, back, is_reply)
  if pinfo.visited then return end
  if not is_reply then
    pending[key] = { number = pinfo.number, time = pinfo.abs_ts }
  elseif pending[back] then
    request_of[pinfo.number], reply_of[pending[back].number] = pending[back], pinfo.number
    pending[back] = nil
  end
end

local function add_match(tree, pinfo)
  local request, reply = request_of[pinfo.number], reply_of[pinfo.number]
  if reply then tree:add(f.answered, reply):set_generated() end
  if request then
    tree:add(f.answers, request.number):set_generated()
    local seconds = pinfo.abs_ts - request.time
    local whole = math.floor(seconds)
    tree:add(f.time, NSTime.new(whole, math.floor((seconds - whole) * 1e9 + 0.5))):set_generated()
  end
end

-- What an access goes to: bar0+0x8

local function target(buffer, offset, command)
  if (command == 9 or command == 10) and buffer:len() >= offset + 16 then
    local region = buffer(offset + 8, 4):le_uint()
    return string.format(" %s+0x%s:%d", REGIONS[region] or ("region " .. region),
      buffer(offset, 8):le_uint64():tohex():gsub("^0+(%x)", "%1"), buffer(offset + 12, 4):le_uint())
  elseif command == 16 and buffer:len() >= offset + 8 then
    local index = buffer(offset + 4, 2):le_uint()
    return " " .. (FEATURES[index] or ("feature " .. index))
  end
  return ""
end

function proto.dissector(buffer, pinfo, tree)
  local count, behind = buffer(3, 1):uint(), 8 + 16 * buffer(3, 1):uint()
  if buffer(0, 1):uint() ~= 1 or buffer:len() < behind + 16 then return 0 end
  local sender, twin = buffer(1, 1):uint(), buffer(2, 1):uint()
  local id, command = buffer(behind, 2):le_uint(), buffer(behind + 2, 2):le_uint()
  local flags, errno = buffer(behind + 8, 4):le_uint(), buffer(behind + 12, 4):le_uint()
  local is_reply, is_error = flags % 16 == 1, math.floor(flags / 32) % 2 == 1
  local name = COMMANDS[command] or ("command " .. command)

  pinfo.cols.protocol = "vfio-user"
  pinfo.cols.src = SENDERS[sender]
  pinfo.cols.dst = SENDERS[1 - sender]
  local what = name .. (is_reply and " reply" or "")
  if is_error then what = what .. ", errno " .. errno end
  pinfo.cols.info = string.format("#%d %s%s", id, what, target(buffer, behind + 16, command))

  local top = tree:add(proto, buffer(), "vfio-user, " .. what)
  top:add(f.sender, buffer(1, 1))
  top:add(f.twin, buffer(2, 1))
  top:add_le(f.connection, buffer(4, 4))
  for i = 0, count - 1 do
    top:add(f.fd_kind, buffer(8 + 16 * i, 1)):add_le(f.fd_size, buffer(16 + 16 * i, 8))
  end
  top:add_le(f.id, buffer(behind, 2))
  top:add_le(f.command, buffer(behind + 2, 2))
  top:add_le(f.size, buffer(behind + 4, 4))
  local word = top:add_le(f.flags, buffer(behind + 8, 4))
  for _, field in ipairs({ f.type, f.no_reply, f.error_flag }) do word:add_le(field, buffer(behind + 8, 4)) end
  local item = top:add_le(f.error, buffer(behind + 12, 4))
  if is_error then item:add_proto_expert_info(refused, "Refused, errno " .. errno) end
  add_payload(top, buffer, behind + 16, command, is_reply)

  local connection = buffer(4, 4):le_uint()
  local function key(from) return string.format("%d %d %d %d %d", connection, twin, from, id, command) end
  match(pinfo, key(sender), key(1 - sender), is_reply)
  add_match(top, pinfo)
  return buffer:len()
end
