// Flags that several subcommands of `epserve` have alike. Used by options.cc alone.
#ifndef EPSERVE_CLIENT_COMMAND_SHARED_FLAGS_H_
#define EPSERVE_CLIENT_COMMAND_SHARED_FLAGS_H_

#include <CLI/CLI.hpp>
#include <string>

#include "client/cpp/channel_security.h"

namespace epserve::client {

CLI::Validator Between(double least, double most);  // a number, which NaN is not
CLI::Validator Seconds(double least);
CLI::Validator WholeNumber();  // from 0, below 2^64

// How a call shows who it is, and whom it trusts.
void AddSecurity(CLI::App* command, ChannelSecurity& security);

// The service that is called, with AddSecurity's.
void AddServer(CLI::App* command, std::string& server, double& timeout_s,
               ChannelSecurity& security);
void AddModel(CLI::App* command, std::string& model);
CLI::Option* AddAttempts(CLI::App* command, int& attempts);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_SHARED_FLAGS_H_
