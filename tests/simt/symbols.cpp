// Names of kernels and places in their source, for messages. dladdr cannot name kernels in anonymous
// namespaces, so this reads the full symbol table of the file.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "simt/internal.h"

namespace mmk::simt {
namespace {

// The function symbol at `offset` from the load address of an ELF file, or "".
std::string symbol_at(const char* path, ElfW(Addr) offset) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (file.size() < sizeof(ElfW(Ehdr))) return "";
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(ElfW(Sym)); ++k) {
      if ((symbols[k].st_info & 0xf) == STT_FUNC && symbols[k].st_value == offset)
        return names + symbols[k].st_name;
    }
  }
  return "";
}

}  // namespace

std::string kernel_symbol(const void* function) {
  Dl_info info;
  link_map* map = nullptr;
  if (dladdr1(function, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) != 0 && map != nullptr) {
    const char* path = map->l_name[0] != '\0' ? map->l_name : "/proc/self/exe";
    const std::string symbol = symbol_at(path, reinterpret_cast<ElfW(Addr)>(function) - map->l_addr);
    if (!symbol.empty()) return symbol;
  }
  char address[32];
  std::snprintf(address, sizeof(address), "at %p", function);
  return address;
}

std::string kernel_name(const void* function) {
  const std::string symbol = kernel_symbol(function);
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : symbol;
  std::free(text);
  return name;
}

std::string source_place(const void* instruction) {
  Dl_info info;
  link_map* map = nullptr;
  if (dladdr1(instruction, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0 || map == nullptr) {
    return "an unknown place";
  }
  const std::string path =
      map->l_name[0] != '\0' ? map->l_name : std::filesystem::read_symlink("/proc/self/exe");
  char command[64];
  // Minus one: a return address points to the next instruction.
  std::snprintf(command, sizeof(command), "addr2line -s -i 0x%zx -e ",
                static_cast<size_t>(reinterpret_cast<ElfW(Addr)>(instruction) - map->l_addr - 1));
  FILE* pipe = popen((command + ("'" + path + "' 2>&1")).c_str(), "r");
  if (pipe == nullptr) return "an unknown place";
  std::string places;
  char line[256];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    const std::string place(line, std::strcspn(line, " \n"));
    places += (places.empty() ? "" : " in ") + place;
  }
  pclose(pipe);
  return places;
}

}  // namespace mmk::simt
