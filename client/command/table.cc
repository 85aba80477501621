#include "client/command/table.h"

#include <algorithm>

namespace epserve::client {

namespace {

constexpr char kGap[] = "  ";

std::string Line(const std::vector<Cell>& cells, const std::vector<Column>& columns,
                 const std::vector<std::size_t>& widths, const Terminal& terminal) {
  std::string line;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const std::string padding(widths[i] - DisplayWidth(cells[i].text), ' ');
    const std::string text = terminal.Paint(cells[i].color, cells[i].text);
    line += i == 0 ? "" : kGap;
    line += columns[i].align == Align::kRight ? padding + text : text + padding;
  }
  line.erase(line.find_last_not_of(' ') + 1);
  return line + "\n";
}

}  // namespace

std::string Table::Render(const Terminal& terminal) const {
  std::vector<std::size_t> widths;
  std::vector<Cell> header;
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    std::size_t width = DisplayWidth(columns_[i].header);
    for (const auto& row : rows_) width = std::max(width, DisplayWidth(row[i].text));
    widths.push_back(width);
    header.emplace_back(columns_[i].header, Color::kBold);
  }
  std::string rule;
  for (std::size_t i = 0; i < widths.size(); ++i) {
    if (i > 0) rule += kGap;
    for (std::size_t c = 0; c < widths[i]; ++c) rule += "─";
  }
  std::string text = Line(header, columns_, widths, terminal);
  text += terminal.Paint(Color::kDim, rule) + "\n";
  for (const auto& row : rows_) text += Line(row, columns_, widths, terminal);
  return text;
}

}  // namespace epserve::client
