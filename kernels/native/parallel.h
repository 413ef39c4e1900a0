// Work in pieces, on XLA's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() std::this_thread::yield()
#endif

// A step makes hundreds of calls of some ten microseconds, and waking a thread takes longer than that. So a thread of
// the pool that has helped with one call stays for a moment and helps with the next. Then it goes back to the pool,
// which may have other work for it.
class Crew {
 public:
  static Crew& of_process() {
    static Crew* const crew = new Crew;  // never destroyed: helpers may outlive the end of main
    return *crew;
  }

  // Calls call(i) for all i in [0, count), on this thread and on threads of the pool, and waits for the last call.
  // Which thread makes which call is left open, so a call must not depend on it. A pool has `num_threads` and
  // `Schedule`, as XLA's has.
  template <class Pool, class Call>
  void run(Pool& pool, int64_t count, const Call& call) {
    const int64_t threads = std::min(count, pool.num_threads());
    if (threads <= 1) {
      for (int64_t i = 0; i < count; ++i) call(i);
      return;
    }
    const auto job = std::make_shared<Job>(count, std::cref(call));
    int64_t missing;
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(job);
      missing = threads - 1 - helpers_;
      if (missing > 0) helpers_ += missing;
      num_started_.fetch_add(1, std::memory_order_release);
    }
    for (; missing > 0; --missing) pool.Schedule([this] { help(); });
    job->work();
    {
      const std::lock_guard lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
    }
    for (int spins = 0; job->done.load(std::memory_order_acquire) < count; ++spins) {
      spins < 4096 ? RELAX() : std::this_thread::yield();  // another program may need this core
    }
    if (job->has_failed) std::rethrow_exception(job->error);
  }

 private:
  // A helper may hold a job when its call has returned. It then finds no piece left, so it touches the counters alone.
  struct Job {
    Job(int64_t count, std::function<void(int64_t)> call) : count(count), call(std::move(call)) {}

    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        try {
          call(i);
        } catch (...) {  // no memory; the thread that waits throws it again
          if (!has_failed.exchange(true)) error = std::current_exception();
        }
        done.fetch_add(1, std::memory_order_release);
      }
    }

    const int64_t count;
    const std::function<void(int64_t)> call;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> has_failed{false};
    std::exception_ptr error;  // of the first call that failed
  };

  std::shared_ptr<Job> open_job() {
    const std::lock_guard lock(mutex_);
    for (const auto& job : jobs_) {
      if (job->next.load(std::memory_order_relaxed) < job->count) return job;
    }
    return nullptr;
  }

  void help() {
    using Clock = std::chrono::steady_clock;
    for (auto idle_since = Clock::now();;) {
      const int64_t seen = num_started_.load(std::memory_order_acquire);
      if (const auto job = open_job()) {
        job->work();
        idle_since = Clock::now();
        continue;
      }
      while (num_started_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 32; ++i) RELAX();
        if (Clock::now() - idle_since > kPatience) {
          const std::lock_guard lock(mutex_);
          if (num_started_.load(std::memory_order_relaxed) != seen) break;
          --helpers_;
          return;
        }
      }
    }
  }

  static constexpr std::chrono::microseconds kPatience{50};

  std::mutex mutex_;
  std::vector<std::shared_ptr<Job>> jobs_;  // calls that are running; guarded by mutex_
  int64_t helpers_ = 0;                     // threads in `help`, or on their way; guarded by mutex_
  std::atomic<int64_t> num_started_{0};
};

template <class Pool, class Call>
void in_parallel(Pool& pool, int64_t count, const Call& call) {
  Crew::of_process().run(pool, count, call);
}
