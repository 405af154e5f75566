// A gRPC load generator for unary calls with prepared bodies: closed loop or open loop.
//
//   serving_load --address HOST:PORT --seconds 10 --warm-up 2 --connections 8
//       (--concurrency 32 | --rate 1000) [--series]
//       --call NAME,WEIGHT,/package.Service/Method,HEADS[,TAILS] ...
//
// HEADS and TAILS are files of bodies, each framed by its length (uint32, little-endian). A request
// is a random head followed by a random tail: protocol buffers of one type may be concatenated, so
// a user and a list of candidates need not be encoded together. Kinds of call are drawn by weight.
//
// Closed loop: every completion starts the next call. Open loop: calls leave at the times of a
// Poisson process, whatever the server does, and latency counts from the intended time, so a
// stalled server (or generator) cannot hide the requests it delayed. Percentiles are exact.
//
// Prints one JSON object: for each kind counts, errors by gRPC status, milliseconds; for replies the
// values of the varint fields 1 and 4 (of RecommendResponse: release and fallback).

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

struct Kind {
  std::string name;
  double weight = 1.0;
  std::string method;
  std::vector<grpc::Slice> heads, tails;
};

struct Options {
  std::string address;
  double seconds = 10.0, warm_up = 2.0, rate = 0.0, deadline = 10.0;
  int concurrency = 0, connections = 8;
  std::uint64_t seed = 0;
  bool series = false;
  std::vector<Kind> kinds;
};

struct Call {
  grpc::ClientContext context;
  grpc::ByteBuffer reply;
  grpc::Status status;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
  Clock::time_point due;
  std::size_t kind = 0;
};

struct Outcomes {
  std::vector<std::pair<double, double>> due_and_latency;
  std::map<int, std::uint64_t> errors;
  std::map<std::uint64_t, std::uint64_t> field_1, field_4;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "serving_load: %s\n", message.c_str());
  std::exit(2);
}

std::vector<grpc::Slice> ReadBodies(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail("cannot read " + path);
  const std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<grpc::Slice> bodies;
  std::size_t at = 0;
  while (at + 4 <= data.size()) {
    std::uint32_t size = 0;
    for (int byte = 3; byte >= 0; --byte)
      size = size << 8 | static_cast<unsigned char>(data[at + byte]);
    at += 4;
    if (at + size > data.size()) Fail(path + " is cut off");
    bodies.emplace_back(data.data() + at, size);
    at += size;
  }
  if (bodies.empty()) Fail(path + " holds no body");
  return bodies;
}

Kind ParseKind(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  if (parts.size() < 4 || parts.size() > 5) Fail("--call wants NAME,WEIGHT,METHOD,HEADS[,TAILS]");
  Kind kind;
  kind.name = parts[0];
  kind.weight = std::atof(parts[1].c_str());
  kind.method = parts[2];
  kind.heads = ReadBodies(parts[3]);
  if (parts.size() == 5) kind.tails = ReadBodies(parts[4]);
  return kind;
}

Options ParseOptions(int count, char** arguments) {
  Options options;
  for (int place = 1; place < count; ++place) {
    const std::string name = arguments[place];
    if (name == "--series") {
      options.series = true;
      continue;
    }
    if (place + 1 >= count) Fail(name + " wants a value");
    const std::string value = arguments[++place];
    if (name == "--address") options.address = value;
    else if (name == "--seconds") options.seconds = std::atof(value.c_str());
    else if (name == "--warm-up") options.warm_up = std::atof(value.c_str());
    else if (name == "--rate") options.rate = std::atof(value.c_str());
    else if (name == "--deadline") options.deadline = std::atof(value.c_str());
    else if (name == "--concurrency") options.concurrency = std::atoi(value.c_str());
    else if (name == "--connections") options.connections = std::atoi(value.c_str());
    else if (name == "--seed") options.seed = std::strtoull(value.c_str(), nullptr, 10);
    else if (name == "--call") options.kinds.push_back(ParseKind(value));
    else Fail("unknown option " + name);
  }
  if (options.address.empty() || options.kinds.empty()) Fail("give --address and --call");
  if ((options.concurrency > 0) == (options.rate > 0)) Fail("give --concurrency or --rate");
  if (options.connections < 1) Fail("--connections wants at least 1");
  return options;
}

bool ReadVarint(const std::uint8_t*& at, const std::uint8_t* end, std::uint64_t& value) {
  value = 0;
  for (int shift = 0; at < end && shift < 64; shift += 7) {
    value |= static_cast<std::uint64_t>(*at & 0x7f) << shift;
    if (!(*at++ & 0x80)) return true;
  }
  return false;
}

void CountFields(const grpc::ByteBuffer& reply, Outcomes& outcomes) {
  grpc::Slice slice;
  if (!reply.DumpToSingleSlice(&slice).ok()) return;
  const std::uint8_t *at = slice.begin(), *end = slice.end();
  std::uint64_t tag = 0, value = 0, field_1 = 0, field_4 = 0;
  while (at < end && ReadVarint(at, end, tag)) {
    switch (tag & 7) {
      case 0:
        if (!ReadVarint(at, end, value)) return;
        if (tag >> 3 == 1) field_1 = value;
        if (tag >> 3 == 4) field_4 = value;
        break;
      case 1: at += 8; break;
      case 2:
        if (!ReadVarint(at, end, value)) return;
        at += value;
        break;
      case 5: at += 4; break;
      default: return;
    }
  }
  ++outcomes.field_1[field_1];
  ++outcomes.field_4[field_4];
}

class Generator {
 public:
  explicit Generator(const Options& options)
      : options_(options), random_(options.seed), outcomes_(options.kinds.size()) {
    std::vector<double> weights;
    for (const Kind& kind : options.kinds) weights.push_back(kind.weight);
    draw_kind_ = std::discrete_distribution<std::size_t>(weights.begin(), weights.end());
    for (int n = 0; n < options.connections; ++n) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      auto channel = grpc::CreateCustomChannel(options.address, grpc::InsecureChannelCredentials(),
                                               arguments);
      if (!channel->WaitForConnected(Clock2Deadline(10.0))) Fail("cannot reach " + options.address);
      stubs_.push_back(std::make_unique<grpc::GenericStub>(channel));
    }
  }

  void Run() {
    begin_ = Clock::now();
    measured_from_ = begin_ + Length(options_.warm_up);
    end_ = measured_from_ + Length(options_.seconds);
    if (options_.concurrency > 0) {
      for (int n = 0; n < options_.concurrency; ++n) Start(Clock::now());
      Receive();
    } else {
      std::thread sender([this] { SendOnTime(); });
      Receive();
      sender.join();
    }
  }

  void Print() const {
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    const double cpu = used.ru_utime.tv_sec + used.ru_stime.tv_sec +
                       1e-6 * (used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    std::printf("{\"seconds\": %.3f, \"loop\": \"%s\", \"concurrency\": %d, \"rate\": %.1f, "
                "\"connections\": %d, \"generator_cpu_seconds\": %.2f",
                options_.seconds, options_.concurrency > 0 ? "closed" : "open",
                options_.concurrency, options_.rate, options_.connections, cpu);
    std::vector<std::pair<double, double>> all;
    std::map<int, std::uint64_t> errors;
    for (const Outcomes& one : outcomes_) {
      all.insert(all.end(), one.due_and_latency.begin(), one.due_and_latency.end());
      for (const auto& [code, count] : one.errors) errors[code] += count;
    }
    PrintLatencies(all, errors);
    std::printf(", \"calls\": {");
    for (std::size_t place = 0; place < outcomes_.size(); ++place) {
      const Outcomes& one = outcomes_[place];
      std::printf("%s\"%s\": {\"weight\": %g", place ? ", " : "",
                  options_.kinds[place].name.c_str(), options_.kinds[place].weight);
      PrintLatencies(one.due_and_latency, one.errors);
      PrintCounts("field_1", one.field_1);
      PrintCounts("field_4", one.field_4);
      std::printf("}");
    }
    std::printf("}");
    if (options_.series) PrintSeries(all);
    std::printf("}\n");
  }

 private:
  static Clock::duration Length(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
  }

  static std::chrono::system_clock::time_point Clock2Deadline(double seconds) {
    return std::chrono::system_clock::now() +
           std::chrono::duration_cast<std::chrono::system_clock::duration>(Seconds(seconds));
  }

  void Start(Clock::time_point due) {
    auto* call = new Call;
    call->due = due;
    call->kind = draw_kind_(random_);
    call->context.set_deadline(Clock2Deadline(options_.deadline));
    const Kind& kind = options_.kinds[call->kind];
    grpc::Slice slices[2] = {kind.heads[random_() % kind.heads.size()], grpc::Slice()};
    if (!kind.tails.empty()) slices[1] = kind.tails[random_() % kind.tails.size()];
    const grpc::ByteBuffer body(slices, kind.tails.empty() ? 1 : 2);
    auto& stub = stubs_[next_stub_++ % stubs_.size()];
    ++under_way_;
    call->reader = stub->PrepareUnaryCall(&call->context, kind.method, body, &queue_);
    call->reader->StartCall();
    call->reader->Finish(&call->reply, &call->status, call);
  }

  void SendOnTime() {
    std::exponential_distribution<double> gap(options_.rate);
    double at = 0.0;
    while (true) {
      at += gap(random_);
      const Clock::time_point due = begin_ + Length(at);
      if (due >= end_) break;
      std::this_thread::sleep_until(due);
      Start(due);
    }
    all_sent_ = true;
    if (under_way_ == 0) queue_.Shutdown();
  }

  void Receive() {
    const bool closed = options_.concurrency > 0;
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
      const Clock::time_point now = Clock::now();
      std::unique_ptr<Call> call(static_cast<Call*>(tag));
      // Started before the reply is looked at, so that the server never waits for that.
      if (closed && now < end_) Start(now);
      if (call->due >= measured_from_ && now <= end_ + Length(options_.deadline)) Note(*call, now);
      if (--under_way_ == 0 && (closed || all_sent_)) queue_.Shutdown();
    }
  }

  void Note(const Call& call, Clock::time_point now) {
    if (options_.concurrency > 0 && now > end_) return;
    Outcomes& outcomes = outcomes_[call.kind];
    if (!call.status.ok()) {
      if (outcomes.errors.empty())
        std::fprintf(stderr, "serving_load: %s\n", call.status.error_message().c_str());
      ++outcomes.errors[call.status.error_code()];
      return;
    }
    outcomes.due_and_latency.emplace_back(Seconds(call.due - measured_from_).count(),
                                          Seconds(now - call.due).count());
    CountFields(call.reply, outcomes);
  }

  static double Percentile(const std::vector<double>& sorted, double share) {
    if (sorted.empty()) return 0.0;
    const auto place = static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1));
    return 1e3 * sorted[place];
  }

  void PrintLatencies(const std::vector<std::pair<double, double>>& found,
                      const std::map<int, std::uint64_t>& errors) const {
    std::vector<double> sorted;
    for (const auto& one : found) sorted.push_back(one.second);
    std::sort(sorted.begin(), sorted.end());
    std::printf(", \"ok\": %zu, \"per_second\": %.1f, \"ms\": {\"p50\": %.3f, \"p90\": %.3f, "
                "\"p99\": %.3f, \"p999\": %.3f, \"max\": %.3f}, \"errors\": {",
                sorted.size(), static_cast<double>(sorted.size()) / options_.seconds,
                Percentile(sorted, 0.5), Percentile(sorted, 0.9), Percentile(sorted, 0.99),
                Percentile(sorted, 0.999), Percentile(sorted, 1.0));
    const char* between = "";
    for (const auto& [code, count] : errors) {
      std::printf("%s\"%d\": %llu", between, code, static_cast<unsigned long long>(count));
      between = ", ";
    }
    std::printf("}");
  }

  static void PrintCounts(const char* name, const std::map<std::uint64_t, std::uint64_t>& counts) {
    std::printf(", \"%s\": {", name);
    const char* between = "";
    for (const auto& [value, count] : counts) {
      std::printf("%s\"%llu\": %llu", between, static_cast<unsigned long long>(value),
                  static_cast<unsigned long long>(count));
      between = ", ";
    }
    std::printf("}");
  }

  void PrintSeries(const std::vector<std::pair<double, double>>& all) const {
    std::map<int, std::vector<double>> by_second;
    for (const auto& [due, latency] : all) by_second[static_cast<int>(due)].push_back(latency);
    std::printf(", \"series\": [");
    const char* between = "";
    for (auto& [second, latencies] : by_second) {
      std::sort(latencies.begin(), latencies.end());
      std::printf("%s{\"second\": %d, \"ok\": %zu, \"p50\": %.3f, \"p99\": %.3f}", between, second,
                  latencies.size(), Percentile(latencies, 0.5), Percentile(latencies, 0.99));
      between = ", ";
    }
    std::printf("]");
  }

  const Options& options_;
  std::mt19937_64 random_;
  std::discrete_distribution<std::size_t> draw_kind_;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs_;
  std::size_t next_stub_ = 0;
  grpc::CompletionQueue queue_;
  std::atomic<std::int64_t> under_way_{0};
  std::atomic<bool> all_sent_{false};
  Clock::time_point begin_, measured_from_, end_;
  std::vector<Outcomes> outcomes_;
};

}  // namespace

int main(int count, char** arguments) {
  const Options options = ParseOptions(count, arguments);
  Generator generator(options);
  generator.Run();
  generator.Print();
  return 0;
}
