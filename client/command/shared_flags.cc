#include "client/command/shared_flags.h"

#include <cstdint>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace epserve::client {

CLI::Validator Between(double least, double most) {
  // CLI::Range lets NaN pass, which is neither below nor above anything.
  return CLI::Validator(
      [least, most](std::string& text) -> std::string {
        double value = 0;
        if (absl::SimpleAtod(text, &value) && value >= least && value <= most) return "";
        return absl::StrCat("'", text, "' is not a number in [", least, ", ", most, "]");
      },
      absl::StrCat("FLOAT in [", least, " - ", most, "]"));
}

CLI::Validator Seconds(double least) { return Between(least, 1e7); }

CLI::Validator WholeNumber() {
  return CLI::Validator(
      [](std::string& text) -> std::string {
        std::uint64_t value = 0;
        const bool digits =
            !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
        if (digits && absl::SimpleAtoi(text, &value)) return "";
        return absl::StrCat("'", text, "' is not a whole number from 0");
      },
      "NUMBER");
}

void AddSecurity(CLI::App* command, ChannelSecurity& security) {
  command->add_option("--tls-cert", security.tls_cert,
                      "PEM certificate chain to show (default: none)");
  command->add_option("--tls-key", security.tls_key, "PEM private key of --tls-cert");
  command->add_option("--tls-ca", security.tls_ca,
                      "PEM authorities that the service's certificate must come from (default: no "
                      "TLS)");
  command->add_option("--tls-server-name", security.tls_server_name,
                      "Name that the service's certificate must have (default: the host called)");
  command->add_option("--secret-file", security.secret_file,
                      "File whose first line is the secret to show to the service (default: none)");
}

void AddServer(CLI::App* command, std::string& server, double& timeout_s,
               ChannelSecurity& security) {
  AddSecurity(command, security);
  server = "127.0.0.1:8001";
  command->add_option("--server", server, "Address of the service, HOST:PORT or unix:PATH")
      ->capture_default_str();
  command->add_option("--timeout", timeout_s, "Longest that one call may take, seconds")
      ->check(Seconds(0.001))
      ->capture_default_str();
}

void AddModel(CLI::App* command, std::string& model) {
  command->add_option("--model", model, "Name of the model (default: the only one served)");
}

CLI::Option* AddAttempts(CLI::App* command, int& attempts) {
  return command
      ->add_option("--attempts", attempts,
                   "Attempts in all where the service is unavailable or full")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
}

}  // namespace epserve::client
