#include "copy_config.hpp"

#include <algorithm>
#include <cmath>

#include "../utils/error.hpp"

namespace specgen {
namespace {

// Below this a bulk copy's fixed cost outweighs what it saves in instructions.
constexpr uint32_t kSmallestBulkSegment = 512;
// A block with less work than this finishes later than its start-up pays for.
constexpr uint64_t kLeastBytesPerBlock = 16 * 1024;
// Turning from tile to tile costs a warp a few microseconds: tiles must be long beside that.
constexpr uint64_t kBytesPerTile = 512 * 1024;
constexpr uint32_t kMostTilesPerWarp = 16;
// An SM pushes 33 to 40 GB/s, NVLink takes some 370 GB/s: from here on the SMs together offer more than it carries.
constexpr uint32_t kFewestSmsThatFillTheLink = 12;
constexpr uint32_t kWarps = 4;
// Three stages are the least that keep a load in flight while two drain.
constexpr uint32_t kFewestStages = 3;
constexpr uint32_t kMostStages = 32;

// Stages that hold whole segments. Measured on H100, 16 SMs: a stage of 8 KiB serves segments of 2 KiB and more; eight
// segments of 1 KiB a stage leave a warp bound by instructions, sixteen don't.
uint32_t stage_bytes_for(uint32_t slot_bytes) {
    const uint32_t wanted = slot_bytes < 2048 ? 16384u : 8192u;
    return std::max(slot_bytes, std::min(wanted, kSlotsPerStage * slot_bytes) / slot_bytes * slot_bytes);
}

// Tiles even out SMs that NVLink serves unequally, as it does to a push that offers more than it carries. Elsewhere the
// turning costs more than it evens out. Measured on two H100, rows of 2 KiB, 256 MiB, share of the copy engine with
// tiles / with equal shares: push by 16 SMs 91 / 81 %, push by 8 SMs 62 / 66 %, pull by 16 SMs 89 / 91 %.
uint32_t tiles_for(Direction direction, uint32_t sms, uint64_t bytes_per_warp) {
    if (direction == Direction::kImport || sms < kFewestSmsThatFillTheLink) return 1;
    return uint32_t(std::clamp<uint64_t>(bytes_per_warp / kBytesPerTile, 1, kMostTilesPerWarp));
}

}  // namespace

std::string CopyConfig::to_string() const {
    std::string more = tiles_per_warp > 1 ? concat(", tiles_per_warp=", tiles_per_warp) : "";
    if (max_gbps > 0) more += concat(", max_gbps=", max_gbps);
    return concat("CopyConfig(method=", method, ", sms=", sms, ", warps=", warps, ", stages=", stages,
                  ", stage_bytes=", stage_bytes, more, ")");
}

uint64_t CopyConfig::picoseconds_per_kib() const {
    return max_gbps > 0 ? uint64_t(std::max(1.0, 1024.0 * 1000.0 * sms * warps / max_gbps)) : 0;
}

CopyConfig select_copy_config(uint32_t slot_bytes, uint64_t total_bytes, Direction direction, uint32_t sm_budget) {
    const uint64_t useful = std::max<uint64_t>(1, (total_bytes + kLeastBytesPerBlock - 1) / kLeastBytesPerBlock);
    const uint32_t sms = uint32_t(std::min<uint64_t>(sm_budget, useful));
    if (slot_bytes < kSmallestBulkSegment) return {"vector", sms, 32, 0, 0};
    const uint32_t stage_bytes = stage_bytes_for(slot_bytes);
    const uint32_t warps = kSharedBytesPerBlock / ring_bytes(kWarps, 1, stage_bytes) >= kFewestStages ? kWarps : 2;
    const uint64_t bytes_per_warp = total_bytes / (sms * warps);
    const uint64_t needed = std::max<uint64_t>(kFewestStages, bytes_per_warp / stage_bytes + 3);
    const uint32_t stages =
        uint32_t(std::min<uint64_t>({8, needed, kSharedBytesPerBlock / ring_bytes(warps, 1, stage_bytes)}));
    return {"bulk", sms, warps, stages, stage_bytes, tiles_for(direction, sms, bytes_per_warp)};
}

void check_copy_config(const CopyConfig& config, uint32_t slot_bytes) {
    const auto require = [&](bool ok, const char* field, auto value, const std::string& remedy) {
        if (!ok) throw UsageError(concat(field, "=", value, ": ", remedy));
    };
    if (config.method != "bulk" && config.method != "vector")
        throw UsageError(concat("method=", config.method, ": use vector or bulk"));
    require(config.sms > 0, "sms", config.sms, "use at least one");
    require(config.max_gbps >= 0 && std::isfinite(config.max_gbps), "max_gbps", config.max_gbps,
            "use a pace in GB/s, or 0 for none");
    if (config.method == "vector")
        return require(config.warps > 0 && config.warps <= 32, "warps", config.warps, "use 1 to 32");
    require(config.warps > 0 && config.warps <= 8, "warps", config.warps, "use 1 to 8");
    require(config.stages >= kFewestStages && config.stages <= kMostStages, "stages", config.stages,
            concat("use ", kFewestStages, " to ", kMostStages));
    require(config.warps * config.stages <= kMaxStagesPerBlock, "warps x stages", config.warps * config.stages,
            concat("use at most ", kMaxStagesPerBlock));
    require(config.tiles_per_warp > 0 && config.tiles_per_warp <= 64, "tiles_per_warp", config.tiles_per_warp,
            "use 1 to 64");
    require(config.stage_bytes >= slot_bytes, "stage_bytes", config.stage_bytes,
            "a stage must hold the largest segment");
    require(config.stage_bytes % 16 == 0, "stage_bytes", config.stage_bytes, "use a multiple of 16");
    require(config.shared_bytes() <= kSharedBytesPerBlock, "shared bytes of warps, stages and stage_bytes",
            config.shared_bytes(), "exceeds a block's shared memory");
}

}  // namespace specgen
