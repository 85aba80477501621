#include "client/command/shared_flags.h"

namespace epserve::client {

CLI::Range Seconds(double least) { return CLI::Range(least, 1e7); }

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
