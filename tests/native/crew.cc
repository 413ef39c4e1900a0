// Calls of several threads at once share the crew: every piece is done once, and is done when its call returns.
//
// scripts/check_native.sh compiles this with the thread sanitizer, which cannot look into a process that runs XLA.
#include "../../kernels/native/parallel.h"

#include <condition_variable>
#include <cstdio>
#include <deque>

class Pool {
 public:
  explicit Pool(int size) {
    for (int i = 0; i < size; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      is_closed_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return threads_.size(); }
  void Schedule(std::function<void()> job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return is_closed_ || !jobs_.empty(); });
        if (jobs_.empty()) return;
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  std::vector<std::thread> threads_;
  bool is_closed_ = false;
};

int main() {
  std::atomic<int> wrong{0};
  for (const int size : {1, 2, 7}) {
    Pool pool(size);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&pool, &wrong, caller] {
        for (int round = 0; round < 300; ++round) {
          std::vector<int64_t> results(1 + (round * 7 + caller) % 40, 0);  // written without a lock
          in_parallel(pool, results.size(), [&results, round](int64_t i) { results[i] += round + i; });
          for (size_t i = 0; i < results.size(); ++i) wrong += results[i] != round + static_cast<int64_t>(i);
        }
      });
    }
    for (auto& caller : callers) caller.join();
  }
  std::printf("%d wrong\n", wrong.load());
  return wrong != 0;
}
