#pragma once

#include <cerrno>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace specgen {

// A value the caller gave, or an operation the state forbids.
struct UsageError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};
// The operating system or the CUDA driver refused.
struct SystemFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ChannelClosed : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ChannelTimeout : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// Bytes that are no message: wrong magic, length, descriptor count, or an end in the middle.
struct ChannelInvalid : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

inline SystemFailure system_failure(const std::string& what, int error = errno) {
    return SystemFailure(concat(what, ": ", std::strerror(error)));
}

}  // namespace specgen
