use image::Policy;

use super::*;
use crate::guest::{Bus, DiskImage, RemovableKind};

fn read(text: &str) -> Result<Guest> {
    read_one(text, None)
}

fn read_one(text: &str, chosen: Option<&str>) -> Result<Guest> {
    guest(text.as_bytes(), &Place::nowhere(&Policy::default()), chosen)
}

const VSPHERE: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope vmw:buildId="build-1" xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:cim="http://schemas.dmtf.org/wbem/wscim/1/common" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vmw="http://www.vmware.com/schema/ovf"
 xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
 <References>
  <File ovf:href="web-disk1.vmdk" ovf:id="file1" ovf:size="1234"/>
  <File ovf:href="my%20data.vmdk.gz" ovf:id="file2" ovf:compression="gzip"/>
  <File ovf:href="web.nvram" ovf:id="file3"/>
 </References>
 <DiskSection><Info>disks</Info>
  <Disk ovf:capacity="16" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="vmdisk1" ovf:fileRef="file1"
   ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" ovf:populatedSize="99"/>
  <Disk ovf:capacity="${size}" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="vmdisk2" ovf:fileRef="file2"/>
  <Disk ovf:capacity="1048576" ovf:diskId="vmdisk3"/>
 </DiskSection>
 <NetworkSection><Info/><Network ovf:name="VM Network"><Description/></Network></NetworkSection>
 <VirtualSystem ovf:id="web"><Info>A virtual machine</Info><Name>web server</Name>
  <OperatingSystemSection ovf:id="96" vmw:osType="debian11_64Guest"><Info/></OperatingSystemSection>
  <ProductSection ovf:class="app"><Property ovf:key="x" ovf:value="1"/></ProductSection>
  <ProductSection><Property ovf:key="size" ovf:value="100"/></ProductSection>
  <AnnotationSection><Info/><Annotation>notes here</Annotation></AnnotationSection>
  <VirtualHardwareSection ovf:transport="iso"><Info/>
   <System><vssd:ElementName>f</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>
    <vssd:VirtualSystemIdentifier>web</vssd:VirtualSystemIdentifier>
    <vssd:VirtualSystemType>vmx-19</vssd:VirtualSystemType></System>
   <Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:ElementName>4 virtual CPU(s)</rasd:ElementName>
    <rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>
    <rasd:VirtualQuantity>4</rasd:VirtualQuantity><vmw:CoresPerSocket ovf:required="false">2</vmw:CoresPerSocket></Item>
   <Item ovf:bound="max"><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>
    <rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
   <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>mem</rasd:ElementName>
    <rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType>
    <rasd:VirtualQuantity>4096</rasd:VirtualQuantity></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:ElementName>SCSI Controller 0</rasd:ElementName>
    <rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType>
    <rasd:ResourceType>6</rasd:ResourceType></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:ElementName>SATA Controller 0</rasd:ElementName>
    <rasd:InstanceID>4</rasd:InstanceID><rasd:ResourceSubType>vmware.sata.ahci</rasd:ResourceSubType>
    <rasd:ResourceType>20</rasd:ResourceType></Item>
   <Item><rasd:ElementName>NVMe</rasd:ElementName><rasd:InstanceID>40</rasd:InstanceID>
    <rasd:ResourceSubType>vmware.nvme.controller</rasd:ResourceSubType><rasd:ResourceType>20</rasd:ResourceType></Item>
   <Item ovf:required="false"><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>CD</rasd:ElementName>
    <rasd:InstanceID>5</rasd:InstanceID><rasd:Parent>4</rasd:Parent>
    <rasd:ResourceSubType>vmware.cdrom.remotepassthrough</rasd:ResourceSubType><rasd:ResourceType>15</rasd:ResourceType></Item>
   <Item><rasd:AddressOnParent>1</rasd:AddressOnParent><rasd:ElementName>Hard disk 2</rasd:ElementName>
    <rasd:HostResource>/disk/vmdisk2</rasd:HostResource><rasd:InstanceID>7</rasd:InstanceID>
    <rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
   <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>Hard disk 1</rasd:ElementName>
    <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>6</rasd:InstanceID>
    <rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
   <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>Hard disk 3</rasd:ElementName>
    <rasd:HostResource>ovf:/disk/vmdisk3</rasd:HostResource><rasd:InstanceID>8</rasd:InstanceID>
    <rasd:Parent>40</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
   <Item><rasd:AddressOnParent>7</rasd:AddressOnParent><rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
    <rasd:Connection>VM Network</rasd:Connection><rasd:ElementName>Ethernet 1</rasd:ElementName>
    <rasd:InstanceID>9</rasd:InstanceID><rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType>
    <rasd:ResourceType>10</rasd:ResourceType>
    <vmw:Config ovf:required="false" vmw:key="slotInfo.pciSlotNumber" vmw:value="192"/></Item>
   <Item ovf:required="false"><rasd:ElementName>Video card</rasd:ElementName><rasd:InstanceID>10</rasd:InstanceID>
    <rasd:ResourceType>24</rasd:ResourceType><vmw:Config vmw:key="videoRamSizeInKB" vmw:value="4096"/></Item>
   <Item><rasd:ElementName>odd</rasd:ElementName><rasd:InstanceID>11</rasd:InstanceID>
    <rasd:ResourceSubType>vendor.thing</rasd:ResourceSubType><rasd:ResourceType>1</rasd:ResourceType></Item>
   <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
   <vmw:Config ovf:required="false" vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>
  </VirtualHardwareSection>
 </VirtualSystem>
</Envelope>"#;

#[test]
fn a_package_of_vsphere() {
    let guest = read(VSPHERE).unwrap();
    assert_eq!((guest.name.as_str(), guest.origin), ("web server", Origin::Vmware));
    assert_eq!(guest.os_hint.as_deref(), Some("debian11_64Guest"));
    assert_eq!(guest.description.as_deref(), Some("notes here"));
    assert_eq!((guest.cpus.count, guest.cpus.topology), (Some(4), Some((2, 2, 1))), "bounds do not count");
    assert_eq!(guest.memory_bytes, Some(4 << 30));
    assert_eq!(guest.firmware.kind, Some(FirmwareKind::Uefi));
    assert!(guest.firmware.secure_boot);
    let ids: Vec<&str> = guest.disks.iter().map(|disk| disk.id.as_str()).collect();
    assert_eq!(ids, ["Hard disk 1", "Hard disk 2", "Hard disk 3"], "by their addresses");
    assert_eq!(guest.disks[0].image, super::super::image("./web-disk1.vmdk", Some("vmdk")));
    assert_eq!(guest.disks[0].capacity_bytes, Some(16 << 30));
    assert_eq!(
        (guest.disks[0].bus, guest.disks[0].controller.as_deref()),
        (Some(Bus::Scsi), Some("VirtualSCSI"))
    );
    assert_eq!(guest.disks[1].guest_name.as_deref(), Some("sdb"));
    assert_eq!(guest.disks[1].capacity_bytes, Some(100 << 20), "a property");
    assert_eq!(guest.disks[2].image, DiskImage::Empty { size_bytes: 1 << 20 });
    assert_eq!(guest.disks[2].guest_name.as_deref(), Some("nvme0n1"));
    assert_eq!(guest.removables[0].bus, Some(Bus::Sata));
    let nic = &guest.nics[0];
    assert_eq!(
        (nic.model.as_deref(), nic.network_name.as_deref(), nic.slot),
        (Some("vmxnet3"), Some("VM Network"), Some(192))
    );
    assert_eq!(nic.mac, None);
    assert_eq!(guest.display.unwrap().video_bytes, Some(4 << 20));
    let notes = guest.notes.join("\n");
    assert!(notes.contains("odd") && notes.contains("OVF environment"), "{notes}");
}

/// A package of VirtualBox: version 1, and version 2 with its own items for disks and network ports.
fn virtualbox(version: u32) -> String {
    let (disk, port, prefix, port_prefix) = match version {
        1 => ("Item", "Item", "rasd", "rasd"),
        _ => ("StorageItem", "EthernetPortItem", "sasd", "epasd"),
    };
    format!(
        r#"<?xml version="1.0"?>
<Envelope ovf:version="{version}.0" xml:lang="en-US" xmlns="http://schemas.dmtf.org/ovf/envelope/{version}"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/{version}"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
 xmlns:epasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_EthernetPortAllocationSettingData.xsd"
 xmlns:sasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_StorageAllocationSettingData.xsd"
 xmlns:vbox="http://www.virtualbox.org/ovf/machine">
 <References><File ovf:id="file1" ovf:href="deb-disk001.vmdk"/></References>
 <DiskSection><Info/><Disk ovf:capacity="8589934592" ovf:diskId="vmdisk1" ovf:fileRef="file1"
  ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" vbox:uuid="2a1c"/></DiskSection>
 <NetworkSection><Info/><Network ovf:name="NAT"/></NetworkSection>
 <VirtualSystem ovf:id="deb"><Info/>
  <OperatingSystemSection ovf:id="96"><Info/><Description>Debian_64</Description>
   <vbox:OSType ovf:required="false">Debian_64</vbox:OSType></OperatingSystemSection>
  <VirtualHardwareSection><Info/>
   <System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>
    <vssd:VirtualSystemIdentifier>deb</vssd:VirtualSystemIdentifier>
    <vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType></System>
   <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>
   <Item><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID>
    <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>1024</rasd:VirtualQuantity></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>PIIX4</rasd:ResourceSubType>
    <rasd:ResourceType>5</rasd:ResourceType></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceSubType>AHCI</rasd:ResourceSubType>
    <rasd:ResourceType>20</rasd:ResourceType></Item>
   <Item><rasd:InstanceID>6</rasd:InstanceID><rasd:ResourceSubType>ensoniq1371</rasd:ResourceSubType>
    <rasd:ResourceType>35</rasd:ResourceType></Item>
   <{disk}><{prefix}:AddressOnParent>0</{prefix}:AddressOnParent><{prefix}:Caption>disk1</{prefix}:Caption>
    <{prefix}:HostResource>/disk/vmdisk1</{prefix}:HostResource><{prefix}:InstanceID>8</{prefix}:InstanceID>
    <{prefix}:Parent>5</{prefix}:Parent><{prefix}:ResourceType>17</{prefix}:ResourceType></{disk}>
   <{disk}><{prefix}:AddressOnParent>1</{prefix}:AddressOnParent><{prefix}:InstanceID>9</{prefix}:InstanceID>
    <{prefix}:Parent>3</{prefix}:Parent><{prefix}:ResourceType>15</{prefix}:ResourceType></{disk}>
   <{port}><{port_prefix}:Address>080027AABBCC</{port_prefix}:Address><{port_prefix}:Connection>NAT</{port_prefix}:Connection>
    <{port_prefix}:InstanceID>10</{port_prefix}:InstanceID><{port_prefix}:ResourceSubType>E1000</{port_prefix}:ResourceSubType>
    <{port_prefix}:ResourceType>10</{port_prefix}:ResourceType></{port}>
  </VirtualHardwareSection>
  <vbox:Machine ovf:required="false" version="1.16-linux" uuid="{{8d0f0c5e-0000-4000-8000-1234567890ab}}" name="deb" OSType="Debian_64">
   <Hardware><CPU count="1"/><Memory RAMSize="1024"/><Firmware type="EFI"/><BIOS><IOAPIC enabled="true"/></BIOS>
    <RTC localOrUTC="UTC"/></Hardware></vbox:Machine>
 </VirtualSystem>
</Envelope>"#
    )
}

/// What no other tool reads (virt-v2v issue 18): the second version has its disks and network cards elsewhere.
#[test]
fn both_versions_of_virtualbox_say_the_same() {
    let (one, two) = (read(&virtualbox(1)).unwrap(), read(&virtualbox(2)).unwrap());
    assert_eq!(one, two);
    assert_eq!((one.name.as_str(), one.origin), ("deb", Origin::VirtualBox));
    assert_eq!(one.memory_bytes, Some(1 << 30));
    assert_eq!(one.disks.len(), 1);
    assert_eq!((one.disks[0].bus, one.disks[0].guest_name.as_deref()), (Some(Bus::Sata), Some("sda")));
    assert_eq!(one.removables[0].kind, RemovableKind::Cdrom);
    assert_eq!(one.nics[0].mac.as_deref(), Some("08:00:27:aa:bb:cc"));
    assert_eq!(one.sound.as_deref(), Some("es1370"));
    assert_eq!(one.os_hint.as_deref(), Some("Debian_64"));
    assert_eq!(one.firmware.kind, Some(FirmwareKind::Uefi), "only VirtualBox's own part says so");
}

/// Found by fuzzing: the number of the second item, and the cores of the first.
#[test]
fn of_several_processor_items_the_last_counts_as_a_whole() {
    let item = |count: u32, cores: &str| {
        format!(
            "<Item><ResourceType>3</ResourceType><VirtualQuantity>{count}</VirtualQuantity>{cores}</Item>"
        )
    };
    let text = format!(
        "<Envelope xmlns:ovf='urn:o'><VirtualSystem ovf:id='a'><VirtualHardwareSection>{}{}\
         </VirtualHardwareSection></VirtualSystem></Envelope>",
        item(4, "<CoresPerSocket>2</CoresPerSocket>"),
        item(6, "")
    );
    let cpus = read(&text).unwrap().cpus;
    assert_eq!((cpus.count, cpus.topology), (Some(6), None));
}

#[test]
fn one_of_several_machines_has_to_be_chosen() {
    let machine = |id: &str| {
        format!(
            "<VirtualSystem ovf:id='{id}'><Name>n-{id}</Name><VirtualHardwareSection>\
             <Item><ResourceType>4</ResourceType><VirtualQuantity>64</VirtualQuantity></Item>\
             </VirtualHardwareSection></VirtualSystem>"
        )
    };
    let text = format!(
        "<Envelope xmlns:ovf='urn:o'><VirtualSystemCollection ovf:id='all'>{}<VirtualSystemCollection>{}\
         </VirtualSystemCollection></VirtualSystemCollection></Envelope>",
        machine("a"),
        machine("b")
    );
    assert_eq!(read_one(&text, Some("a")).unwrap().name, "n-a");
    assert_eq!(read_one(&text, Some("n-b")).unwrap().name, "n-b");
    let error = read(&text).unwrap_err();
    assert!(error.to_string().contains("'n-a', 'n-b'"), "{error}");
    assert!(read_one(&text, Some("c")).unwrap_err().to_string().contains("'c'"));
    assert_eq!(systems(text.as_bytes()).unwrap().len(), 2);
}

/// The drafts that vSphere 4's betas wrote: no prefixes, sections by type.
#[test]
fn drafts_are_read() {
    let text = "<Envelope xmlns='http://www.vmware.com/schema/ovf/1/envelope' xmlns:xsi='urn:x'>\
        <References><File href='d.vmdk' id='f'/></References>\
        <Section xsi:type='ovf:DiskSection_Type'><Disk capacity='1' capacityAllocationUnits='GigaBytes' diskId='d' fileRef='f'/></Section>\
        <Content xsi:type='ovf:VirtualSystem_Type' id='old'><Section xsi:type='ovf:VirtualHardwareSection_Type'>\
        <Item><Caption>mem</Caption><InstanceId>1</InstanceId><ResourceType>4</ResourceType>\
        <AllocationUnits>MegaBytes</AllocationUnits><VirtualQuantity>256</VirtualQuantity></Item>\
        <Item><Caption>ide</Caption><InstanceId>3</InstanceId><ResourceType>5</ResourceType></Item>\
        <Item><Caption>disk</Caption><InstanceId>9</InstanceId><ResourceType>17</ResourceType><HostResource>disk/d</HostResource>\
        <Parent>3</Parent><AddressOnParent>0</AddressOnParent></Item></Section></Content></Envelope>";
    let guest = read(text).unwrap();
    assert_eq!((guest.name.as_str(), guest.memory_bytes), ("old", Some(256 << 20)));
    assert_eq!(guest.disks[0].capacity_bytes, Some(1 << 30));
    assert_eq!(guest.disks[0].bus, Some(Bus::Ide));
}

fn with_disk(files: &str, disks: &str) -> String {
    format!(
        "<Envelope><References>{files}</References><DiskSection>{disks}</DiskSection><VirtualSystem id='x'>\
         <VirtualHardwareSection><Item><ResourceType>17</ResourceType><HostResource>ovf:/disk/d</HostResource></Item>\
         </VirtualHardwareSection></VirtualSystem></Envelope>"
    )
}

#[test]
fn disks_that_cannot_be_read_are_refused_with_the_way_out() {
    let error = |files: &str, disks: &str| read(&with_disk(files, disks)).unwrap_err();
    let one = "<Disk diskId='d' fileRef='f' capacity='1'/>";
    let chunked = error("<File id='f' href='a.vmdk' chunkSize='1000'/>", one);
    assert!(
        chunked.to_string().contains("chunks") && chunked.hints()[0].contains("cat 'a.vmdk'.0*"),
        "{chunked:?}"
    );
    assert!(error("<File id='f' href='a' compression='bzip2'/>", one).to_string().contains("bzip2"));
    assert!(error("<File id='f' href='http://x/a'/>", one).to_string().contains("URL"));
    assert!(error("", one).to_string().contains("does not list"));
    assert!(error("", "").to_string().contains("no disk 'd'"));
    assert!(error("", "<Disk diskId='d'/>").to_string().contains("capacity"));
    assert!(error("", "<Disk diskId='d' capacity='${no}'/>").to_string().contains("${no}"));
    assert!(
        error("", "<Disk diskId='d' capacity='1' capacityAllocationUnits='byte * 2^64'/>")
            .to_string()
            .contains("no size")
    );
    assert!(error("", "<Disk diskId='d' capacity='1' parentRef='d'/>").to_string().contains("parents"));
    assert!(read("<a/>").unwrap_err().to_string().contains("'a'"));
    assert!(read("<Envelope/>").unwrap_err().to_string().contains("no virtual machine"));
}

#[test]
fn a_chain_names_its_members() {
    let text = with_disk(
        "<File id='f' href='top.vmdk'/><File id='g' href='base.vmdk'/>",
        "<Disk diskId='d' fileRef='f' capacity='1' parentRef='e' format='x/vmdk.html'/><Disk diskId='e' fileRef='g' capacity='1'/>",
    );
    let DiskImage::Name { name, .. } = &read(&text).unwrap().disks[0].image else { panic!("a file") };
    assert!(name.starts_with("json:") && name.contains("top.vmdk") && name.contains("base.vmdk"), "{name}");
}

/// Items of other configurations are not part of the machine.
#[test]
fn the_default_configuration_is_in_force() {
    let text = "<Envelope xmlns:ovf='urn:o'><DeploymentOptionSection><Configuration ovf:id='small'/>\
        <Configuration ovf:id='large' ovf:default='true'/></DeploymentOptionSection><VirtualSystem ovf:id='x'>\
        <VirtualHardwareSection><Item ovf:configuration='small'><ResourceType>3</ResourceType><VirtualQuantity>1</VirtualQuantity></Item>\
        <Item ovf:configuration='large huge'><ResourceType>3</ResourceType><VirtualQuantity>8</VirtualQuantity></Item>\
        </VirtualHardwareSection></VirtualSystem></Envelope>";
    let guest = read(text).unwrap();
    assert_eq!(guest.cpus.count, Some(8));
    assert!(guest.notes[0].contains("'large'"), "{:?}", guest.notes);
}
