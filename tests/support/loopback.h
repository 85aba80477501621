// Connections over loopback, both ends of which are the test's.
#ifndef EPSERVE_TESTS_SUPPORT_LOOPBACK_H_
#define EPSERVE_TESTS_SUPPORT_LOOPBACK_H_

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <string>

#include "runtime/base/unique_fd.h"

namespace epserve {

struct LoopbackConnection {
  runtime::UniqueFd caller;
  runtime::UniqueFd accepted;
  std::string peer;  // the caller's end, as gRPC names it

  // Sends that much from the caller, and returns once it has been read at the other end.
  void Send(std::size_t num_bytes) const {
    std::string bytes(num_bytes, 'x');
    ASSERT_EQ(::send(caller.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(num_bytes));
    ASSERT_EQ(::recv(accepted.get(), bytes.data(), bytes.size(), MSG_WAITALL),
              static_cast<ssize_t>(num_bytes));
  }
};

class LoopbackListener {
 public:
  LoopbackListener() : listener_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address_);
    EXPECT_EQ(::bind(fd(), raw(), size), 0);
    EXPECT_EQ(::listen(fd(), 8), 0);
    EXPECT_EQ(::getsockname(fd(), raw(), &size), 0);
  }

  int fd() const { return listener_.get(); }
  int port() const { return ntohs(address_.sin_port); }

  LoopbackConnection Connect() {
    LoopbackConnection made;
    made.caller = runtime::UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(made.caller.get(), raw(), sizeof(address_)), 0);
    made.accepted = runtime::UniqueFd(::accept4(fd(), nullptr, nullptr, SOCK_CLOEXEC));
    EXPECT_TRUE(made.accepted.valid());
    sockaddr_in own{};
    socklen_t size = sizeof(own);
    EXPECT_EQ(::getsockname(made.caller.get(), reinterpret_cast<sockaddr*>(&own), &size), 0);
    made.peer = "ipv4:127.0.0.1:" + std::to_string(ntohs(own.sin_port));
    return made;
  }

 private:
  sockaddr* raw() { return reinterpret_cast<sockaddr*>(&address_); }

  runtime::UniqueFd listener_;
  sockaddr_in address_{};
};

}  // namespace epserve

#endif  // EPSERVE_TESTS_SUPPORT_LOOPBACK_H_
