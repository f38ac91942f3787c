// The addon's surface: checks arguments, takes pointers out of JavaScript memory, and lets the threads wake JavaScript
// through one thread-safe function. Whoever calls keeps tables and buffers alive until the matching event has come
// (src/datapath/native.ts does). Decisions and bytes are elsewhere.
#include <errno.h>
#include <fcntl.h>
#include <napi.h>

#include <cstring>
#include <string>

#include "connection.h"
#include "crc32c.h"
#include "datapath.h"

namespace {

/// Raised with every change of the commands, events or arguments; src/datapath/native.ts refuses another.
constexpr double kBindingVersion = 4;

struct Handle {
  std::unique_ptr<nbd::Datapath> datapath;
  napi_env env = nullptr;
  napi_threadsafe_function wake = nullptr;
};

void wakeJavaScript(void* context) {
  Handle* handle = static_cast<Handle*>(context);
  napi_call_threadsafe_function(handle->wake, nullptr, napi_tsfn_nonblocking);
}

/// The environment ends (process.exit, a worker that is terminated): threads stop before its memory goes.
void cleanUp(void* context) { static_cast<Handle*>(context)->datapath.reset(); }

Napi::Value fail(Napi::Env env, const std::string& message, int error = 0) {
  Napi::Error thrown = Napi::Error::New(env, error == 0 ? message : message + ": " + strerror(error));
  if (error != 0) thrown.Set("errno", Napi::Number::New(env, error));
  thrown.ThrowAsJavaScriptException();
  return env.Undefined();
}

nbd::Datapath* datapathOf(const Napi::CallbackInfo& info) {
  if (info.Length() < 1 || !info[0].IsExternal()) {
    fail(info.Env(), "node-nbd: the first argument is no handle");
    return nullptr;
  }
  Handle* handle = info[0].As<Napi::External<Handle>>().Data();
  if (!handle->datapath) fail(info.Env(), "node-nbd: the datapath is closed");
  return handle->datapath.get();
}

double number(const Napi::CallbackInfo& info, size_t index) { return info[index].As<Napi::Number>().DoubleValue(); }
uint32_t word(const Napi::CallbackInfo& info, size_t index) { return info[index].As<Napi::Number>().Uint32Value(); }

const uint32_t* wordsOf(const Napi::Value& value) { return value.As<Napi::Uint32Array>().Data(); }

nbd::Tables tablesOf(const Napi::CallbackInfo& info, size_t first) {
  return {static_cast<uint64_t>(info[first].As<Napi::Number>().Int64Value()), wordsOf(info[first + 1]),
          wordsOf(info[first + 2]), wordsOf(info[first + 3])};
}

/// (options, onWake): handle. Options: memberFds, dataMembers, parityMembers, chunkSize, dataOffset, threads, engine and
/// the limits.
Napi::Value open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 2 || !info[0].IsObject() || !info[1].IsFunction()) return fail(env, "node-nbd: open arguments");
  const Napi::Object options = info[0].As<Napi::Object>();
  auto get = [&](const char* name) { return options.Get(name).As<Napi::Number>().Int64Value(); };
  nbd::Layout layout;
  const Napi::Array fds = options.Get("memberFds").As<Napi::Array>();
  for (uint32_t i = 0; i < fds.Length(); i++) {
    nbd::Member member;
    member.fd = fds.Get(i).As<Napi::Number>().Int32Value();
    layout.members.push_back(member);
  }
  layout.dataMembers = static_cast<uint32_t>(get("dataMembers"));
  layout.parityMembers = static_cast<uint32_t>(get("parityMembers"));
  layout.chunkSize = static_cast<uint64_t>(get("chunkSize"));
  layout.dataOffset = static_cast<uint64_t>(get("dataOffset"));
  if (layout.members.empty() || layout.members.size() > nbd::kMembersMax || layout.dataMembers < 1 ||
      layout.dataMembers + layout.parityMembers != layout.members.size() || layout.chunkSize < 512) {
    return fail(env, "node-nbd: layout");
  }
  nbd::Limits limits;
  limits.payloadMax = static_cast<uint32_t>(get("payloadMax"));
  limits.requestsInFlight = static_cast<uint32_t>(get("requestsInFlight"));
  limits.payloadPerConnection = static_cast<uint64_t>(get("payloadPerConnection"));
  limits.payloadTotal = static_cast<uint64_t>(get("payloadTotal"));
  limits.replyBytesQueued = static_cast<uint64_t>(get("replyBytesQueued"));
  limits.statusExtentsMax = static_cast<uint32_t>(get("statusExtentsMax"));
  const int64_t threads = get("threads");
  if (threads < 1 || threads > nbd::kLoopsMax) return fail(env, "node-nbd: 1 to 64 threads");
  const auto engine = static_cast<nbd::EngineChoice>(get("engine"));

  Handle* handle = new Handle;
  handle->env = env;
  // The function first and the hook second: hooks run in reverse, so threads end while the function still exists.
  if (napi_create_threadsafe_function(env, info[1], nullptr, Napi::String::New(env, "node-nbd"), 0, 1, nullptr,
                                      nullptr, nullptr, nullptr, &handle->wake) != napi_ok) {
    delete handle;
    return fail(env, "node-nbd: thread-safe function");
  }
  std::string reason;
  handle->datapath = nbd::Datapath::open(std::move(layout), limits, static_cast<uint32_t>(threads), engine,
                                         wakeJavaScript, handle, &reason);
  if (!handle->datapath) {
    napi_release_threadsafe_function(handle->wake, napi_tsfn_abort);
    delete handle;
    return fail(env, reason);
  }
  napi_add_env_cleanup_hook(env, cleanUp, handle);
  return Napi::External<Handle>::New(env, handle, [](Napi::Env, Handle* dropped) {
    // Reached with the environment's end, after the hook, or after stop().
    dropped->datapath.reset();
    delete dropped;
  });
}

/// (handle): { engine, threads }.
Napi::Value describe(const Napi::CallbackInfo& info) {
  nbd::Datapath* datapath = datapathOf(info);
  if (datapath == nullptr) return info.Env().Undefined();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("engine", datapath->engine() == nbd::EngineKind::IoUring ? "io_uring" : "threads");
  result.Set("threads", datapath->threads());
  return result;
}

/// (handle, export, stripeSize, formatUnit, fill, size, slots, init, direct)
Napi::Value openExport(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    datapath->openExport(word(info, 1), static_cast<uint64_t>(number(info, 2)), word(info, 3),
                         static_cast<uint8_t>(word(info, 4)), tablesOf(info, 5));
  }
  return info.Env().Undefined();
}

/// (handle, export, tag, size, slots, init, direct)
Napi::Value retable(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    datapath->retable(word(info, 1), number(info, 2), tablesOf(info, 3));
  }
  return info.Env().Undefined();
}

/// (handle, export, session, fd, received, mode, contexts, readOnly): duplicates the descriptor.
Napi::Value serve(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  nbd::Datapath* datapath = datapathOf(info);
  if (datapath == nullptr) return env.Undefined();
  nbd::SessionOptions options;
  options.id = word(info, 2);
  const Napi::Buffer<uint8_t> received = info[4].As<Napi::Buffer<uint8_t>>();
  options.received.assign(received.Data(), received.Data() + received.Length());
  options.rules.mode = static_cast<nbd::Mode>(word(info, 5));
  const Napi::Uint32Array contexts = info[6].As<Napi::Uint32Array>();
  if (contexts.ElementLength() > nbd::kContextsMax) return fail(env, "node-nbd: too many contexts");
  options.contexts.assign(contexts.Data(), contexts.Data() + contexts.ElementLength());
  options.rules.contexts = !options.contexts.empty();
  options.rules.contextCount = static_cast<uint32_t>(options.contexts.size());
  options.rules.readOnly = info[7].As<Napi::Boolean>().Value();
  options.lane = info[8].As<Napi::Boolean>().Value();
  options.rules.payloadMax = datapath->payloadMax();
  options.fd = fcntl(info[3].As<Napi::Number>().Int32Value(), F_DUPFD_CLOEXEC, 3);
  if (options.fd < 0) return fail(env, "node-nbd: cannot duplicate the socket", errno);
  datapath->serve(word(info, 1), std::move(options));
  return env.Undefined();
}

/// (handle, export, lane, thread, descriptor)
Napi::Value openLane(const Napi::CallbackInfo& info) {
  nbd::Datapath* datapath = datapathOf(info);
  if (datapath == nullptr) return info.Env().Undefined();
  const uint32_t loop = word(info, 3);
  if (loop >= datapath->threads()) return fail(info.Env(), "node-nbd: there is no such thread");
  const int fd = fcntl(info[4].As<Napi::Number>().Int32Value(), F_DUPFD_CLOEXEC, 3);
  if (fd < 0) return fail(info.Env(), "node-nbd: cannot duplicate the socket", errno);
  datapath->openLane(word(info, 1), word(info, 2), loop, fd);
  return info.Env().Undefined();
}

/// (handle, export, forwards, lanesOnly)
Napi::Value setLanes(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    datapath->setForwards(word(info, 1), info[2].As<Napi::Boolean>().Value());
    datapath->setLanesOnly(word(info, 1), info[3].As<Napi::Boolean>().Value());
  }
  return info.Env().Undefined();
}

/// (handle, export, offset, length): whether a lane had one of the blocks
Napi::Value holdBlocks(const Napi::CallbackInfo& info) {
  nbd::Datapath* datapath = datapathOf(info);
  if (datapath == nullptr) return info.Env().Undefined();
  const bool taken = datapath->holdBlocks(word(info, 1), static_cast<uint64_t>(number(info, 2)),
                                          static_cast<uint64_t>(number(info, 3)));
  return Napi::Boolean::New(info.Env(), taken);
}

/// (handle, export, offset, length)
Napi::Value releaseBlocks(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    datapath->releaseBlocks(word(info, 1), static_cast<uint64_t>(number(info, 2)),
                            static_cast<uint64_t>(number(info, 3)));
  }
  return info.Env().Undefined();
}

/// (handle, export, offset, length): whether something in the range is on a lane
Napi::Value blocksBusy(const Napi::CallbackInfo& info) {
  nbd::Datapath* datapath = datapathOf(info);
  if (datapath == nullptr) return info.Env().Undefined();
  const bool busy = datapath->blocksBusy(word(info, 1), static_cast<uint64_t>(number(info, 2)),
                                         static_cast<uint64_t>(number(info, 3)));
  return Napi::Boolean::New(info.Env(), busy);
}

/// (handle, words, count)
Napi::Value submit(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    const Napi::Float64Array words = info[1].As<Napi::Float64Array>();
    const size_t count = word(info, 2);
    if (count > words.ElementLength()) return fail(info.Env(), "node-nbd: submit count");
    datapath->submit(words.Data(), count);
  }
  return info.Env().Undefined();
}

/// (handle, upcall index, words)
Napi::Value completeStatus(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    const Napi::Float64Array words = info[2].As<Napi::Float64Array>();
    datapath->completeStatus(word(info, 1), words.Data(), words.ElementLength());
  }
  return info.Env().Undefined();
}

/// (handle, export, kind, offset, length, payload or null): the upcall's index. The payload is not copied.
Napi::Value adopt(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  nbd::Datapath* datapath = datapathOf(info);
  if (datapath == nullptr) return env.Undefined();
  const auto kind = static_cast<nbd::UpcallKind>(word(info, 2));
  const uint64_t length = static_cast<uint64_t>(number(info, 4));
  uint8_t* data = nullptr;
  if (kind == nbd::UpcallKind::Write) {
    if (!info[5].IsBuffer()) return fail(env, "node-nbd: a write needs a payload");
    Napi::Buffer<uint8_t> payload = info[5].As<Napi::Buffer<uint8_t>>();
    if (payload.Length() != length || length == 0) return fail(env, "node-nbd: the payload's length");
    data = payload.Data();
  } else if (kind != nbd::UpcallKind::Trim && kind != nbd::UpcallKind::Zero) {
    return fail(env, "node-nbd: only writes, trims and zeroes are adopted");
  }
  const uint32_t index = datapath->adopt(word(info, 1), kind, static_cast<uint64_t>(number(info, 3)), length, data);
  return Napi::Number::New(env, index);
}

/// (handle, upcall index, offset, buffer)
Napi::Value readPayload(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    Napi::Buffer<uint8_t> target = info[3].As<Napi::Buffer<uint8_t>>();
    if (!datapath->readPayload(word(info, 1), static_cast<uint64_t>(number(info, 2)), target.Data(), target.Length())) {
      return fail(info.Env(), "node-nbd: the range is not inside the payload");
    }
  }
  return info.Env().Undefined();
}

/// (handle, tag, export, offset, buffer)
Napi::Value readRange(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    Napi::Buffer<uint8_t> target = info[4].As<Napi::Buffer<uint8_t>>();
    datapath->readRange(number(info, 1), word(info, 2), static_cast<uint64_t>(number(info, 3)), target.Data(),
                        target.Length());
  }
  return info.Env().Undefined();
}

/// (handle, tag, write, slot, offset, buffer)
Napi::Value slotIo(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    Napi::Buffer<uint8_t> buffer = info[5].As<Napi::Buffer<uint8_t>>();
    const uint64_t offset = static_cast<uint64_t>(number(info, 4));
    const uint64_t stripeSize = datapath->layout().stripeSize();
    if (offset > stripeSize || buffer.Length() > stripeSize - offset) {
      return fail(info.Env(), "node-nbd: the range is not inside a slot");
    }
    datapath->slotIo(number(info, 1), info[2].As<Napi::Boolean>().Value(), word(info, 3), offset, buffer.Data(),
                     buffer.Length());
  }
  return info.Env().Undefined();
}

/// (handle, records): number of records; 0 after stop().
Napi::Value drain(const Napi::CallbackInfo& info) {
  Handle* handle = info[0].As<Napi::External<Handle>>().Data();
  if (!handle->datapath) return Napi::Number::New(info.Env(), 0);
  Napi::Float64Array records = info[1].As<Napi::Float64Array>();
  const size_t count = handle->datapath->drain(records.Data(), records.ElementLength() / nbd::kRecordWords);
  return Napi::Number::New(info.Env(), static_cast<double>(count));
}

/// (handle, export, numbers)
Napi::Value exportCounters(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    Napi::Float64Array out = info[2].As<Napi::Float64Array>();
    if (out.ElementLength() < 13) return fail(info.Env(), "node-nbd: 13 counters");
    datapath->exportCounters(word(info, 1), out.Data());
  }
  return info.Env().Undefined();
}

/// (handle, numbers)
Napi::Value memberCounters(const Napi::CallbackInfo& info) {
  if (nbd::Datapath* datapath = datapathOf(info)) {
    Napi::Float64Array out = info[1].As<Napi::Float64Array>();
    if (out.ElementLength() < 5 * datapath->layout().members.size()) {
      return fail(info.Env(), "node-nbd: 5 counters a member");
    }
    datapath->memberCounters(out.Data());
  }
  return info.Env().Undefined();
}

/// (handle): joins all threads; the process may then end.
Napi::Value stop(const Napi::CallbackInfo& info) {
  Handle* handle = info[0].As<Napi::External<Handle>>().Data();
  if (handle->datapath) {
    handle->datapath.reset();
    napi_remove_env_cleanup_hook(handle->env, cleanUp, handle);
    napi_release_threadsafe_function(handle->wake, napi_tsfn_release);
  }
  return info.Env().Undefined();
}

/// (bytes, before): the CRC-32C. Called once a frame of the link, so it takes the shortest way through the interface.
napi_value checksum(napi_env env, napi_callback_info info) {
  size_t count = 2;
  napi_value arguments[2];
  void* bytes = nullptr;
  size_t length = 0;
  uint32_t before = 0;
  napi_value result = nullptr;
  if (napi_get_cb_info(env, info, &count, arguments, nullptr, nullptr) != napi_ok || count < 2 ||
      napi_get_buffer_info(env, arguments[0], &bytes, &length) != napi_ok ||
      napi_get_value_uint32(env, arguments[1], &before) != napi_ok) {
    napi_throw_type_error(env, nullptr, "node-nbd: crc32c takes a buffer and a number");
    return nullptr;
  }
  napi_create_uint32(env, nbd::crc32c(before, bytes, length), &result);
  return result;
}

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  exports.Set("version", Napi::Number::New(env, kBindingVersion));
  exports.Set("open", Napi::Function::New(env, open));
  exports.Set("describe", Napi::Function::New(env, describe));
  exports.Set("openExport", Napi::Function::New(env, openExport));
  exports.Set("retable", Napi::Function::New(env, retable));
  exports.Set("serve", Napi::Function::New(env, serve));
  exports.Set("openLane", Napi::Function::New(env, openLane));
  exports.Set("setLanes", Napi::Function::New(env, setLanes));
  exports.Set("holdBlocks", Napi::Function::New(env, holdBlocks));
  exports.Set("releaseBlocks", Napi::Function::New(env, releaseBlocks));
  exports.Set("blocksBusy", Napi::Function::New(env, blocksBusy));
  exports.Set("submit", Napi::Function::New(env, submit));
  exports.Set("completeStatus", Napi::Function::New(env, completeStatus));
  exports.Set("adopt", Napi::Function::New(env, adopt));
  exports.Set("readPayload", Napi::Function::New(env, readPayload));
  exports.Set("readRange", Napi::Function::New(env, readRange));
  exports.Set("slotIo", Napi::Function::New(env, slotIo));
  exports.Set("drain", Napi::Function::New(env, drain));
  exports.Set("exportCounters", Napi::Function::New(env, exportCounters));
  exports.Set("memberCounters", Napi::Function::New(env, memberCounters));
  exports.Set("stop", Napi::Function::New(env, stop));
  napi_value crc32c = nullptr;
  if (napi_create_function(env, "crc32c", NAPI_AUTO_LENGTH, checksum, nullptr, &crc32c) == napi_ok) {
    exports.Set("crc32c", crc32c);
  }
  return exports;
}

}  // namespace

NODE_API_MODULE(node_nbd, initialise)
