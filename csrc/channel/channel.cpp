#include "channel.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <chrono>

#include "../utils/error.hpp"

namespace specgen {
namespace {

struct FrameHeader {
    uint32_t magic;
    uint32_t bytes;
    uint32_t fds;
};

class Deadline {
  public:
    explicit Deadline(int timeout_ms)
        : timeout_ms_(timeout_ms), end_(Clock::now() + std::chrono::milliseconds(timeout_ms)) {}

    void await(int socket, short events, const char* what) const {
        for (;;) {
            const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
            pollfd entry{socket, events, 0};
            const int ready = ::poll(&entry, 1, left > 0 ? int(left) : 0);
            if (ready > 0) return;
            if (ready == 0) throw ChannelTimeout(concat("peer did not ", what, " within ", timeout_ms_, " ms"));
            if (errno != EINTR) throw system_failure("poll");
        }
    }

  private:
    using Clock = std::chrono::steady_clock;
    int timeout_ms_;
    Clock::time_point end_;
};

void collect_fds(msghdr& message, std::vector<ScopedFd>& fds) {
    for (cmsghdr* entry = CMSG_FIRSTHDR(&message); entry != nullptr; entry = CMSG_NXTHDR(&message, entry)) {
        if (entry->cmsg_level != SOL_SOCKET || entry->cmsg_type != SCM_RIGHTS) continue;
        const size_t count = (entry->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; ++i) {
            int fd;
            std::memcpy(&fd, CMSG_DATA(entry) + i * sizeof(int), sizeof(int));
            fds.emplace_back(fd);
        }
    }
}

// Reads exactly `bytes`; descriptors may ride on any part of them. Returns the bytes read when the peer ended early.
size_t read_exactly(int socket, void* target, size_t bytes, const Deadline& deadline, std::vector<ScopedFd>& fds) {
    size_t done = 0;
    while (done < bytes) {
        deadline.await(socket, POLLIN, "send");
        alignas(cmsghdr) char control[CMSG_SPACE(kMaxFrameFds * sizeof(int))];
        iovec part{static_cast<char*>(target) + done, bytes - done};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof(control);
        const ssize_t got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got < 0) {
            if (errno == EINTR || errno == EAGAIN) continue;
            if (errno == ECONNRESET) return done;
            throw system_failure("recvmsg");
        }
        collect_fds(message, fds);
        if (message.msg_flags & MSG_CTRUNC)
            throw ChannelInvalid(concat("message carries more than ", kMaxFrameFds, " descriptors"));
        if (got == 0) return done;
        done += size_t(got);
    }
    return done;
}

}  // namespace

PeerCredentials peer_credentials(int socket) {
    ucred credentials{};
    socklen_t size = sizeof(credentials);
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) throw system_failure("SO_PEERCRED");
    return {credentials.pid, credentials.uid, credentials.gid};
}

void send_frame(int socket, const std::string& payload, const std::vector<int>& fds, int timeout_ms) {
    if (payload.size() > kMaxFrameBytes)
        throw UsageError(concat("message of ", payload.size(), " bytes: the limit is ", kMaxFrameBytes));
    if (fds.size() > kMaxFrameFds)
        throw UsageError(concat(fds.size(), " descriptors in one message: the limit is ", kMaxFrameFds));
    const FrameHeader header{kFrameMagic, uint32_t(payload.size()), uint32_t(fds.size())};
    std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
    bytes += payload;
    const Deadline deadline(timeout_ms);
    size_t done = 0;
    while (done < bytes.size()) {
        deadline.await(socket, POLLOUT, "receive");
        iovec part{bytes.data() + done, bytes.size() - done};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        alignas(cmsghdr) char control[CMSG_SPACE(kMaxFrameFds * sizeof(int))] = {};
        if (done == 0 && !fds.empty()) {
            message.msg_control = control;
            message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
            cmsghdr* entry = CMSG_FIRSTHDR(&message);
            entry->cmsg_level = SOL_SOCKET;
            entry->cmsg_type = SCM_RIGHTS;
            entry->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
            std::memcpy(CMSG_DATA(entry), fds.data(), fds.size() * sizeof(int));
        }
        const ssize_t sent = ::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR || errno == EAGAIN) continue;
            if (errno == EPIPE || errno == ECONNRESET) throw ChannelClosed("peer closed the connection");
            throw system_failure("sendmsg");
        }
        done += size_t(sent);
    }
}

Frame receive_frame(int socket, int timeout_ms) {
    const Deadline deadline(timeout_ms);
    Frame frame;
    FrameHeader header{};
    const size_t got = read_exactly(socket, &header, sizeof(header), deadline, frame.fds);
    if (got == 0) throw ChannelClosed("peer closed the connection");
    if (got < sizeof(header))
        throw ChannelInvalid(concat("truncated message: ", got, " of ", sizeof(header), " header bytes"));
    if (header.magic != kFrameMagic)
        throw ChannelInvalid(concat("message starts with ", header.magic, ", not ", kFrameMagic));
    if (header.bytes > kMaxFrameBytes)
        throw ChannelInvalid(concat("message announces ", header.bytes, " bytes: the limit is ", kMaxFrameBytes));
    frame.payload.resize(header.bytes);
    const size_t body = read_exactly(socket, frame.payload.data(), header.bytes, deadline, frame.fds);
    if (body < header.bytes) throw ChannelInvalid(concat("truncated message: ", body, " of ", header.bytes, " bytes"));
    if (frame.fds.size() != header.fds) {
        throw ChannelInvalid(concat("message announces ", header.fds, " descriptors and carries ", frame.fds.size()));
    }
    return frame;
}

}  // namespace specgen
