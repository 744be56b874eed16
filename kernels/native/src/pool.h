// Threads that share loops. A loop is over when its tasks are done, whoever did them: a thread that
// is late, because the machine is shared, costs nothing but its help.
#pragma once
#include <stdint.h>

namespace herd {

typedef void (*Task)(void* context, long task);  // task: 0 .. num_tasks - 1

// Threads that take part, the caller included; at least 1.
void set_num_threads(int num_threads);
int num_threads();

// Runs every task once and returns when all are done. Tasks next to each other go to one thread as
// far as possible. Serially, if from a task or while another thread's loop is running.
void run(Task task, void* context, long num_tasks);

// Memory of the calling thread, valid until it asks for the same slot again; at least num_bytes,
// aligned to 64. Slots: see who uses them.
enum Slot {
  kActivations, kSpread, kPacked, kCodes, kScales, kTotals, kAttention, kTasks, kLora, kStep,
  kNumScratches
};
void* scratch(int slot, long num_bytes);
void free_scratch();  // of the calling thread, all slots

}  // namespace herd
