// A table of aligned columns. Not synchronised.
#ifndef EPSERVE_CLIENT_COMMAND_TABLE_H_
#define EPSERVE_CLIENT_COMMAND_TABLE_H_

#include <string>
#include <vector>

#include "client/command/terminal.h"

namespace epserve::client {

enum class Align { kLeft, kRight };

struct Column {
  std::string header;
  Align align = Align::kLeft;
};

struct Cell {
  Cell(const char* cell_text)  // NOLINT: a cell is mostly text
      : text(cell_text), color(Color::kPlain) {}
  Cell(std::string cell_text, Color cell_color = Color::kPlain)  // NOLINT: a cell is mostly text
      : text(std::move(cell_text)), color(cell_color) {}
  std::string text;
  Color color;
};

class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // REQUIRES: as many cells as columns.
  void AddRow(std::vector<Cell> cells) { rows_.push_back(std::move(cells)); }

  // Header, a line under it, rows; every line ends in '\n' and none in spaces.
  std::string Render(const Terminal& terminal) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_TABLE_H_
