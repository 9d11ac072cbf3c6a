// Length-prefixed messages with file descriptors over a Unix stream socket. Every wait is bounded.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../utils/scoped_fd.hpp"

namespace specgen {

constexpr uint32_t kFrameMagic = 0x564b4753;  // "SGKV", little-endian
constexpr uint32_t kMaxFrameBytes = 1u << 20;
constexpr uint32_t kMaxFrameFds = 64;

struct Frame {
    std::string payload;
    std::vector<ScopedFd> fds;
};

struct PeerCredentials {
    pid_t pid;
    uid_t uid;
    gid_t gid;
};

// The kernel's word on who connected (SO_PEERCRED).
PeerCredentials peer_credentials(int socket);

// Throws UsageError for a frame over the limits, ChannelClosed, ChannelTimeout.
void send_frame(int socket, const std::string& payload, const std::vector<int>& fds, int timeout_ms);

// Received descriptors are close-on-exec, and closed here when the frame turns out bad.
// Throws ChannelClosed (end between frames), ChannelInvalid, ChannelTimeout.
Frame receive_frame(int socket, int timeout_ms);

}  // namespace specgen
