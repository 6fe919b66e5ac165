#pragma once

constexpr int kWatchedBytes = 8192;  // of shared memory, all of them declared

void threads_without_a_barrier();
void lanes_without_a_barrier();
void copy_without_a_wait();
void nothing_wrong();
