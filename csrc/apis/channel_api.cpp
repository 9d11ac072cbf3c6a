#include <pybind11/stl.h>

#include "../channel/channel.hpp"
#include "../utils/error.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace specgen::apis {

void register_errors(py::module_& module) {
    py::register_exception<UsageError>(module, "UsageError", PyExc_ValueError);
    py::register_exception<SystemFailure>(module, "SystemFailure", PyExc_RuntimeError);
    py::register_exception<ChannelClosed>(module, "ChannelClosed", PyExc_ConnectionError);
    py::register_exception<ChannelTimeout>(module, "ChannelTimeout", PyExc_TimeoutError);
    py::register_exception<ChannelInvalid>(module, "ChannelInvalid", PyExc_ValueError);
}

void register_channel(py::module_& module) {
    module.attr("MAX_FRAME_BYTES") = kMaxFrameBytes;
    module.attr("MAX_FRAME_FDS") = kMaxFrameFds;
    module.def(
        "peer_credentials",
        [](int socket) {
            const PeerCredentials peer = peer_credentials(socket);
            return py::make_tuple(int(peer.pid), int(peer.uid), int(peer.gid));
        },
        py::arg("socket"), "(pid, uid, gid) of the process at the other end of a Unix socket, by the kernel's word.");
    module.def(
        "send_frame",
        [](int socket, const py::bytes& payload, const std::vector<int>& fds, int timeout_ms) {
            const std::string bytes = payload;
            py::gil_scoped_release release;
            send_frame(socket, bytes, fds, timeout_ms);
        },
        py::arg("socket"), py::arg("payload"), py::arg("fds"), py::arg("timeout_ms"),
        "Send one length-prefixed message with file descriptors. Raises ChannelClosed, ChannelTimeout, UsageError.");
    module.def(
        "receive_frame",
        [](int socket, int timeout_ms) {
            Frame frame;
            {
                py::gil_scoped_release release;
                frame = receive_frame(socket, timeout_ms);
            }
            py::list fds;
            for (ScopedFd& fd : frame.fds) fds.append(fd.release());
            return py::make_tuple(py::bytes(frame.payload), fds);
        },
        py::arg("socket"), py::arg("timeout_ms"),
        "(payload, descriptors) of the next message; the caller owns the close-on-exec descriptors. Raises "
        "ChannelClosed, "
        "ChannelInvalid, ChannelTimeout.");
}

}  // namespace specgen::apis
