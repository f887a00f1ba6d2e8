// Work on several threads.
#pragma once

#include <system_error>
#include <thread>
#include <vector>

namespace ltk {

// Runs work(0), ..., work(threads - 1) at the same time, as far as the system gives threads, and waits for all. `work`
// does not throw.
template <class Work>
void on_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(threads);
  int started = 1;
  try {
    for (; started < threads; ++started) others.emplace_back(work, started);
  } catch (const std::system_error&) {  // no thread is to be had: this one does the rest
  }
  work(0);
  for (; started < threads; ++started) work(started);
  for (std::thread& other : others) other.join();
}

}  // namespace ltk
